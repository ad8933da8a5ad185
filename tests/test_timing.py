"""Rounds of calls, what one call is against another, and what disturbed runs cannot tell."""

from dataclasses import replace

import pytest
import torch

from fasp_graph import bench, timing

ROW = bench.Result("small", "torch", 1, 4, 2, 0.25, 0.0, None, None, None)
QUIET = [2.0, 2.1, 2.0] * 5


def test_latency_alternates():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}

    found = timing.latency(calls, repeats=3, warmup=1)

    assert order == ["a", "b"] * 4
    assert set(found) == {"a", "b"} and all(set(v) == {"median", "spread"} for v in found.values())


def test_speedup_compares_round_by_round():
    busy = [1, 8, 1, 9, 1, 7]  # what slows a whole round is not in the ratio

    assert timing.speedup([2 * b for b in busy], busy) == (2, 2, 2)
    assert timing.speedup([3, 2, 1], [1, 1, 1]) == (2, 1, 3)


@pytest.mark.parametrize(("count", "outside"), [(2, 0), (7, 0), (8, 1), (15, 3), (100, 40)])
def test_more_rounds_narrow_the_range(count, outside):
    median, low, high = timing.speedup(range(1, count + 1), [1] * count)

    assert (median, low, high) == ((count + 1) / 2, 1 + outside, count - outside)


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()

    with timing.threads(1):
        assert torch.get_num_threads() == 1
    with timing.threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("own", "spread", "words"),
    [
        (QUIET, 0.0, None),  # as fast, which these runs do tell
        ([1.0, 1.6, 1.1] * 5, 0.0, None),  # disturbed, but faster beyond doubt
        ([1.0, 3.0, 2.0] * 5, 0.0, "0.70 to 2.00 times as fast as dense, which does not say"),
        (QUIET, 0.1, "its runs vary by 40% of their median · help: an idle machine"),
    ],
)
def test_a_warning_says_what_the_runs_cannot(own, spread, words):
    row = bench._compared(replace(ROW, spread=spread), "dense", QUIET, list(own))

    assert row.speedup == pytest.approx(2 / sorted(own)[7], rel=0.06)
    assert row.warning is None if words is None else words in row.warning


def test_the_first_model_is_compared_with_none():
    row = bench._compared(ROW, "dense", QUIET, QUIET)

    assert row == ROW
