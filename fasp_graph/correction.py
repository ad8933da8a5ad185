"""correction: what restore=outputs adds after the walk (passes/correct.py), and which batches it
and sensing run on.

    sense 1/4 of the batches, correct 1/4, held out 1/8 (rounded down, no batch twice)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from passes.capture import Args
from passes.consumers import offset_of, staying, unit_columns
from passes.correct import SHARES, Sample, Site, correct
from passes.couple import Group
from passes.drift import Twin
from passes.observe import Walk
from passes.views import View

from .config import Config

PIECES = 8
RUNS = 1 + len(SHARES)  # of the pruned model on held-out batches


def sensed_on(count: int, config: Config) -> range:
    """Numbers of the batches that are sensed: every fourth, every other without a correction."""
    if config.passes.restore != "outputs":
        return range(0, count, 2)
    return range(0, count, 4)[: max(count // 4, 1)]


def fitted_on(count: int) -> range:
    """Numbers of the batches that the correction is fitted to."""
    return range(1, count, 4)[: count // 4]


def held_out(count: int) -> range:
    """Numbers of the batches that choose its rate."""
    return range(3, count, 8)[: count // 8]


def correction_cost(count: int) -> float:
    """In plain forward passes: a run and a backward pass where it is fitted, and the runs that
    choose the rate. The dense model's outputs are the end of its path beside the walk.
    """
    return (3 * len(fitted_on(count)) + RUNS * len(held_out(count))) / count


def corrected(
    module: GraphModule,
    groups: Sequence[Group],
    views: dict[str, list[View]],
    kept: dict[str, tuple[int, ...]],
    weights: dict[str, Tensor],
    batches: list[Args],
    dense: Twin,
) -> dict[str, Tensor]:
    """`weights`, moved by one step of all consumers where that lowers the held-out distance."""
    state = Walk(module, [], dict(weights))

    def read(name: str) -> Any:
        held: Any = state.weight(name)
        return held.detach() if isinstance(held, Tensor) else held  # the body of a scan

    def samples(numbers: range) -> list[Sample]:
        return [Sample(batches[n], functools.partial(dense.outputs, n)) for n in numbers]

    sites = _sites(groups, views, kept, read)
    if not sites or not held_out(len(batches)):
        return weights
    fit, held = (samples(numbers(len(batches))) for numbers in (fitted_on, held_out))
    return {**weights, **correct(module, read, sites, fit, held).weights}


def _sites(
    groups: Sequence[Group],
    views: dict[str, list[View]],
    kept: dict[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> list[Site]:
    """Consumers whose weight has one use; a consumer of two groups keeps what both keep."""
    found: dict[View, Tensor] = {}
    for group in groups:
        for view in views[group.name]:
            weight = read(view.parameter)
            mask = staying(group, kept[group.name], unit_columns(group, view, weight))
            found[view] = found[view] & mask if view in found else mask
    uses = [view.parameter for view in found]
    return [
        Site(view, offset_of(view), mask)
        for view, mask in found.items()
        if uses.count(view.parameter) == 1
    ]
