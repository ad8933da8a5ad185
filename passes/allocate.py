"""allocate: how many units each group loses, by what the loss costs.

    minimise sum_l E_l(k_l)   so that what is removed reaches the budget

E_l(k): the error of removing k units from every block of group l, read off a greedy elimination
(passes/eliminate.py), in one of three units:

    sensitivity   A-norm of the consumer's output error: the model's output error, first order
    curves        error over ||Y||^2: relative error of the consumer
    standardised  sum of (score - mean) / std over the units that go: one threshold over all layers,
                  FLAP (arXiv 2312.11983)

`influence` knows no errors: one ratio, times a factor per group (`leans`).

The others are solved by a price p: every group takes argmin_k E_l(k) - p * saved_l(k), with
saved_l(k) the share of the budget's cost that it removes alone (passes/cost.py), and p is bisected
until the budget is met; then units are given back, dearest first, while it still is. Where a
measured saved_l is a staircase, that keeps what costs nothing: counts stand at the edges of stairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from .cost import Cost, parameter_cost, scope_size
from .couple import DependencyGraph, Group
from .select import Budget, least, steps

ALLOCATIONS = ("uniform", "sensitivity", "curves", "standardised", "influence")


def leans(cosines: Mapping[str, float]) -> dict[str, float]:
    """allocation=influence: how deep each group is cut, relative to the others. Proportional to
    the mean cosine between the residual stream before and after the group's block, within half and
    one and a half of the mean (O-FANG): a block that turns the stream is cut less.
    """
    middle = max(sum(cosines.values()) / max(len(cosines), 1), 1e-12)
    return {name: min(max(c / middle, 0.5), 1.5) for name, c in cosines.items()}


def allocate_by_error(
    deps: DependencyGraph,
    groups: list[Group],
    uniform: Budget,
    curves: Mapping[str, Sequence[float]],
    target: float,
    align: int = 1,
    min_keep: int = 1,
    per_unit: bool = False,
    cost: Cost | None = None,
) -> Budget:
    """Counts that remove the share `target` of `cost` (parameters, if None) at least error. Groups
    without a curve keep their uniform count.

    `curves[name][k]`: error at k units removed per block. `per_unit`: a unit costs one, whatever
    it is made of.
    """
    cost = cost or parameter_cost(deps, groups)
    open_ = [g for g in groups if g.name in curves]
    multiple = steps(deps, open_, align)
    choices = {g.name: _choices(g, len(curves[g.name]), multiple[g.name], min_keep) for g in open_}
    errors, saved = {}, {}
    for g in open_:
        allowed = choices[g.name]
        errors[g.name] = torch.tensor(curves[g.name], dtype=torch.float64)[allowed]
        alone = torch.from_numpy(cost.alone(g, (g.size // g.blocks - allowed).tolist()))
        saved[g.name] = g.blocks * allowed.double() if per_unit else alone

    def counts(chosen: Mapping[str, int]) -> dict[str, int]:
        cut = {g.name: g.size // g.blocks - int(choices[g.name][chosen[g.name]]) for g in open_}
        return uniform.keep | cut

    def at(level: float) -> dict[str, int]:
        price = math.exp(level)
        return {g.name: int((errors[g.name] - price * saved[g.name]).argmin()) for g in open_}

    def reached(chosen: Mapping[str, int]) -> float:
        return cost.removed(counts(chosen))

    low, high = -60.0, 60.0
    if reached(at(high)) < target - 1e-9:
        raise cost.unreachable(target, reached(at(high)), min_keep, align)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(at(middle)) < target - 1e-9 else (low, middle)
    chosen = _give_back(at(high), errors, saved, lambda c: reached(c) >= target * (1 - 1e-9))
    return Budget(counts(chosen), uniform.ratio, reached(chosen), scope_size(deps))


def _choices(group: Group, length: int, step: int, min_keep: int) -> Tensor:
    """Removable counts per block: what stays is a multiple of `step`, or everything."""
    size = group.size // group.blocks
    removable = [
        k
        for k in range(min(length, size - least(group, min_keep) + 1))
        if k == 0 or (size - k) % step == 0
    ]
    return torch.tensor(removable)


def _give_back(
    chosen: dict[str, int],
    errors: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    enough: Callable[[dict[str, int]], bool],
) -> dict[str, int]:
    """The steepest last step of a curve is undone first, as long as the budget holds; a step that
    saves nothing is the steepest. `chosen`: the place of each group's count among its choices.
    """

    def steepness(name: str) -> float:
        last, before = chosen[name], chosen[name] - 1
        rise = float(errors[name][last] - errors[name][before])
        return rise / max(float(saved[name][last] - saved[name][before]), 1e-15)

    open_ = [name for name, place in chosen.items() if place]
    while open_:
        name = max(open_, key=steepness)
        tried = {**chosen, name: chosen[name] - 1}
        fits = enough(tried)
        chosen = tried if fits else chosen
        if not fits or not chosen[name]:
            open_.remove(name)
    return chosen
