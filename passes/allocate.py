"""allocate: how many units each group loses, by what the loss costs.

    minimise sum_l E_l(k_l)   so that the removed parameters reach the budget

E_l(k): the error of removing k units from every block of group l, read off a greedy elimination
(passes/eliminate.py), in one of three units:

    sensitivity   A-norm of the consumer's output error: the model's output error, first order
    curves        error over ||Y||^2: relative error of the consumer
    standardised  sum of (score - mean) / std over the units that go: one threshold over all layers,
                  FLAP (arXiv 2312.11983)

`influence` knows no errors: one ratio, times a factor per group (`leans`).

The others are solved by a price p per parameter: every group takes
argmin_k E_l(k) - p * parameters(k), and p is bisected until the budget is met; then units are
given back, dearest first, while it still is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .couple import DependencyGraph, Group
from .errors import BudgetError
from .select import Budget, least, removed_parameters, scope_size, steps

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
) -> Budget:
    """Counts that meet `target` at least error. Groups without a curve keep their uniform count.

    `curves[name][k]`: error at k units removed per block. `per_unit`: a unit costs one, whatever
    its parameters.
    """
    total = scope_size(deps)
    open_ = [g for g in groups if g.name in curves]
    multiple = steps(deps, open_, align)
    choices = {g.name: _choices(g, len(curves[g.name]), multiple[g.name], min_keep) for g in open_}
    price = {g.name: 1.0 if per_unit else _price(deps, g) for g in open_}
    errors = {g.name: torch.tensor(curves[g.name], dtype=torch.float64) for g in open_}

    def at(level: float) -> tuple[dict[str, int], float]:
        keep = dict(uniform.keep)
        for g in open_:
            allowed = choices[g.name]
            cost = errors[g.name][allowed] - level * price[g.name] * g.blocks * allowed
            keep[g.name] = g.size // g.blocks - int(allowed[cost.argmin()])
        return keep, removed_parameters(deps, groups, keep) / total

    low, high = -60.0, 60.0
    if at(math.exp(high))[1] < target - 1e-9:
        raise BudgetError(
            f"sparsity {target:.3f} cannot be reached: {at(math.exp(high))[1]:.3f} is the largest "
            f"with min_keep={min_keep} and align={align} · help: ask for less, or prune more kinds"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if at(math.exp(middle))[1] < target - 1e-9 else (low, middle)
    keep, _ = at(math.exp(high))
    keep = _give_back(deps, groups, open_, keep, choices, errors, price, target * total)
    reached = removed_parameters(deps, groups, keep) / total
    return Budget(keep, uniform.ratio, reached, total)


def _choices(group: Group, length: int, step: int, min_keep: int) -> Tensor:
    """Removable counts per block: what stays is a multiple of `step`, or everything."""
    size = group.size // group.blocks
    removable = [
        k
        for k in range(min(length, size - least(group, min_keep) + 1))
        if k == 0 or (size - k) % step == 0
    ]
    return torch.tensor(removable)


def _price(deps: DependencyGraph, group: Group) -> float:
    """Parameters of one unit, all else dense."""
    one = {group.name: group.size // group.blocks - 1}
    return max(removed_parameters(deps, [group], one) / group.blocks, 1)


def _give_back(
    deps: DependencyGraph,
    groups: list[Group],
    open_: list[Group],
    keep: dict[str, int],
    choices: dict[str, Tensor],
    errors: dict[str, Tensor],
    price: dict[str, float],
    needed: float,
) -> dict[str, int]:
    """The steepest last step of a curve is undone first, as long as the budget holds."""
    closed: set[str] = set()
    while len(closed) < len(open_):
        gains = {}
        for g in open_:
            gone = g.size // g.blocks - keep[g.name]
            before = choices[g.name][choices[g.name] < gone]
            if g.name in closed or not len(before):
                closed.add(g.name)
                continue
            less = int(before[-1])
            step = float(errors[g.name][gone] - errors[g.name][less])
            gains[g.name] = (step / (price[g.name] * g.blocks * (gone - less)), less, g)
        if not gains:
            break
        name = max(gains, key=lambda key: gains[key][0])
        _, less, group = gains[name]
        tried = {**keep, name: group.size // group.blocks - less}
        if removed_parameters(deps, groups, tried) < needed * (1 - 1e-9):
            closed.add(name)
        else:
            keep = tried
    return keep
