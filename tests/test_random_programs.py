"""Random programs, pruned at random: exact in float64, or refused by an error that names a node.

`make soak SECONDS=600` runs as many as the time allows.
"""

import pytest
from programs import PARTS, Case, build, drawn, sample
from trial import Mismatch, trial

from benchmarks.soak import minimised, reproducer
from passes.errors import FaspGraphError

PROGRAMS = 96
BUNCH = 8


@pytest.mark.parametrize("first", range(0, PROGRAMS, BUNCH))
def test_programs_verify_or_are_refused(first):
    outcomes = [trial(drawn(seed)) for seed in range(first, first + BUNCH)]

    assert all(outcome.refusal or outcome.cut for outcome in outcomes)
    assert sum(not outcome.refusal for outcome in outcomes) > BUNCH // 2


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
