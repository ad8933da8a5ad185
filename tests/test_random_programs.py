"""Random programs, pruned at random: exact in float64, or refused by an error that names a node.

`make soak SECONDS=600` runs as many as the time allows.
"""

import itertools
import random

import pytest
from programs import PARTS, Case, build, drawn, sample
from trial import CHOICES, Mismatch, trial

from benchmarks.soak import minimised, reproducer
from passes.errors import FaspGraphError

PROGRAMS = 96
WORDS = """
    1 3 4 5 7 9 12 13 14 17 23 25 26 27 30 33 34 35 38 39 40 41 44 48 50 51 53 59 61 62 63 64 68 71
    75 76 77 78 79 80 81 83 84 85 87 88 93
"""
SEEDS = [int(word) for word in WORDS.split()]
BUNCHES = [SEEDS[first : first + 8] for first in range(0, len(SEEDS), 8)]


def kinds(seed):
    """What a program stands for: steps that follow each other in it, each of its steps with
    what is pruned, and how many there are.
    """
    case = drawn(seed)
    steps = [kind for kind, _ in case.steps]
    pruned = random.Random(case.pruning).choice(CHOICES)  # as in `chosen`
    return {*itertools.pairwise(steps), *((kind, pruned) for kind in steps), len(steps)}


def test_the_programs_are_of_all_kinds_that_twice_as_many_are_of():
    def every(seeds):
        return set().union(*map(kinds, seeds))

    assert every(SEEDS) == every(range(PROGRAMS))


@pytest.mark.parametrize("seeds", BUNCHES, ids=lambda seeds: f"{seeds[0]}")
def test_programs_verify_or_are_refused(seeds):
    outcomes = [trial(drawn(seed)) for seed in seeds]

    assert all(outcome.refusal or outcome.cut for outcome in outcomes)
    assert sum(not outcome.refusal for outcome in outcomes) > len(seeds) // 2


@pytest.mark.parametrize("kind", PARTS)
def test_every_kind_of_step_runs_the_same_each_time(kind):
    steps = ((kind, 1), (kind, 2))

    assert build(steps)(sample(0)).equal(build(steps)(sample(0)))


# Programs that the soak found: what was wrong is said by the key.
FOUND = {
    "full_like takes no tensor": Case((("inplace", 1),), 5),
    "more is overwritten than written": Case((("inplace", 5),), 6137),
    "the place that is written moves": Case((("inplace", 19),), 2),
    "groups of a norm must stay equal": Case(
        (("products", 335787), ("norm", 96582), ("pieces", 341757)), 278325
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_programs_that_once_failed(name):
    outcome = trial(FOUND[name])

    assert outcome.cut and not outcome.refusal


def test_a_failure_becomes_a_small_test_that_fails(tmp_path, monkeypatch):
    def lost(case):
        if any(kind == "conv" for kind, _ in case.steps):
            raise Mismatch("made up")

    monkeypatch.setattr("benchmarks.soak.trial", lost)
    case = Case((("mlp", 1), ("conv", 2), ("gate", 3)), 4)

    small, error = minimised(case, Mismatch("made up"))
    text = reproducer(case, error, 17, tmp_path).read_text()

    assert small.steps == (("conv", 2),)
    assert "def test_program_17" in text and "('conv', 2)" in text
    compile(text, "test_program_17.py", "exec")
    assert issubclass(Mismatch, AssertionError) and not issubclass(Mismatch, FaspGraphError)
