"""correction: what restore=outputs adds after the walk (passes/correct.py), and which batches it
and sensing run on.

    sense 1/4 of the batches, each of up to three steps 1/8, held out 1/16 (no batch twice)

As many steps as four forward passes leave. Where a group has several consumers, as the channels of
a residual stream have, the dense path runs beside the walk, which then repays the error of the
stream at each of them (restore=residual); elsewhere a step more does better (restore=affine).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.capture import Args
from passes.consumers import linears, offset_of, staying, unit_columns
from passes.correct import (
    SHARES,
    Correction,
    Sample,
    Site,
    correct,
    dense_outputs,
    vocabularies,
)
from passes.couple import Group
from passes.drift import Twin
from passes.errors import NoGradient
from passes.observe import Walk
from passes.restore import TOWARDS
from passes.views import View

from .config import Config
from .scale.distributed import room, share

PIECES = (16, 8)
"""How many batches are wanted, and how many do."""
STEPS, LIMIT = 3, 4.0


def beside(config: Config, views: Mapping[str, Sequence[View]]) -> bool:
    """Whether the dense path runs beside the walk."""
    restore = config.passes.restore
    several = any(len(consumers) > 1 for consumers in views.values())
    return several if restore == "outputs" else restore in TOWARDS


def sensed_on(count: int, config: Config) -> range:
    """Numbers of the batches that are sensed: every fourth, every other without a correction."""
    if config.passes.restore != "outputs":
        return range(0, count, 2)
    return range(0, count, 4)[: max(count // 4, 1)]


def held_out(count: int) -> range:
    """Numbers of the batches that choose the rates."""
    return range(3, count, 16)[: max(count // 16, int(count >= PIECES[-1]))]


def fitted_on(count: int, dense: bool) -> list[list[int]]:
    """Of each step the numbers of the batches that it is fitted to; `dense`: the dense path runs
    beside the walk.
    """
    left = [number for number in range(count) if number % 4 and number not in held_out(count)]
    fits = [left[step::STEPS][: count // 8] for step in range(STEPS)]
    before = 1 + dense + 3 * (count // 4) / max(count, 1)
    while fits and before + _cost(count, fits, dense) > LIMIT:
        fits.pop()
    return fits if count >= PIECES[-1] else []


def correction_cost(count: int, dense: bool) -> float:
    """In plain forward passes: a run and a backward pass where it is fitted, the runs that choose
    the rates, and the dense model's where it does not run beside the walk.
    """
    fits = fitted_on(count, dense)
    return _cost(count, fits, dense) if fits else 0.0


def _cost(count: int, fits: list[list[int]], dense: bool) -> float:
    runs = 1 + len(SHARES) * len(fits) + (not dense)
    return (sum(map(len, fits)) * (4 - dense) + runs * len(held_out(count))) / count


def corrected(
    module: GraphModule,
    groups: Sequence[Group],
    views: dict[str, list[View]],
    kept: dict[str, tuple[int, ...]],
    weights: dict[str, Tensor],
    batches: list[Args],
    twin: Twin | None,
) -> Correction | None:
    """Steps of all layers where these lower the held-out distance; of the consumers alone where
    something has no derivative between them and the others. None where none can be tried.
    `batches`: those of all processes; `twin`: of this one's.
    """
    state = Walk(module, [], dict(weights))

    def read(name: str) -> Any:
        held: Any = state.weight(name)
        return held.detach() if isinstance(held, Tensor) else held  # the body of a scan

    count = len(batches)
    own = share(range(count))

    def samples(numbers: Iterable[int]) -> list[Sample]:
        mine = [number for number in numbers if number in own]
        if twin is not None:
            places = [(batches[n], own.index(n)) for n in mine]
            return [Sample(b, functools.partial(twin.outputs, place)) for b, place in places]
        found = (batches[n] for n in mine)
        return [Sample(b, functools.partial(dense_outputs, module, b)) for b in found]

    fits = [samples(numbers) for numbers in fitted_on(count, twin is not None)]
    consumers = _consumers(groups, views, kept, read) if fits else []
    if not consumers:
        return None
    sites = [*consumers, *_others(module, consumers, read)]
    for moving in (sites, consumers):
        with contextlib.suppress(NoGradient):  # of an op between producers and consumers, perhaps
            return correct(module, read, moving, fits, samples(held_out(count)), room())
    return None


def _consumers(
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


def _others(
    module: GraphModule, consumers: Sequence[Site], read: Callable[[str], Tensor]
) -> Iterator[Site]:
    """All other layers but a head over the vocabulary."""
    names, words = {site.view.parameter for site in consumers}, vocabularies(module)
    for view in linears(module):
        matrix = view.matrix(read(view.parameter))
        if view.parameter not in names and len(matrix) not in words:
            yield Site(view, offset_of(view), matrix.new_ones(matrix.shape[1], dtype=torch.bool))
