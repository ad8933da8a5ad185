"""How long calls take, and how much faster one is than another.

latency   median and interquartile range of the seconds of one call
speedup   median over the rounds of seconds of one / seconds of the other in the same round, and
          the interval from one order statistic to another that holds the true median with about
          95% (of fewer than eight rounds all of them, which of four hold it with 88%, of three
          with 75%, of two with 50%)

Each round runs every call once, so a busy moment of the machine falls on all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

Clock = Callable[[], float]


def latency(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 15,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Seconds per call: {name: {median, spread}}; spread is the interquartile range."""
    return {name: summary(held) for name, held in rounds(calls, repeats, warmup, clock).items()}


def rounds(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int = 15,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """The seconds of each call in each round, by a clock: `time.process_time` is that of the
    processor, which other processes hardly touch.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(warmup + max(2, repeats)):
            for name, call in calls.items():
                _synchronize()
                started = clock()
                call()
                _synchronize()
                if number >= warmup:
                    seconds[name].append(clock() - started)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """{median, spread}; spread is the interquartile range."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median": median, "spread": high - low}


def speedup(slow: Sequence[float], fast: Sequence[float]) -> tuple[float, float, float]:
    """How many times as fast the second is: (median, low, high) over rounds."""
    found = sorted(a / b for a, b in zip(slow, fast, strict=True))
    outside = max(0, math.floor(len(found) / 2 - 0.98 * math.sqrt(len(found))))
    return statistics.median(found), found[outside], found[-1 - outside]


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Torch and sessions made meanwhile compute with `count` threads; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
