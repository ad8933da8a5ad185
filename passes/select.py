"""select: how many units of each group go, and which.

    sparsity = removed parameters / parameters in scope, or the same of measured time
    scope    = all parameters of the modules that hold a member of a chain, bilinear or head group
               (passes/cost.py)

Uniform allocation: one ratio r for every pruned group, solved so that the sparsity is met; since
scope also holds Q and K, which stay, r is larger than the sparsity. A group's `lean` multiplies its
ratio. In each block the units of least utility go. Counts are multiples of the group's step.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cost import Cost, parameter_cost, scope_size
from .couple import DependencyGraph, Group
from .errors import BudgetError
from .pieces import with_every_piece

ROWS = 8  # of stacked weights: torch's grouped product takes rows of 16 bytes, 8 of half precision


@dataclass(frozen=True)
class Plan:
    """`kept`: group name -> kept units. `ratio`: removed share of units per group. `experts`: group
    name -> for each expert the units that it keeps, where these differ; `kept` then says the places
    that they take (passes/experts.py).
    """

    kept: dict[str, tuple[int, ...]]
    ratio: float
    sparsity: float
    scope: int
    experts: dict[str, list[list[int]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        found = {
            "kept": {name: list(units) for name, units in self.kept.items()},
            "ratio": self.ratio,
            "sparsity": self.sparsity,
            "scope": self.scope,
        }
        return found | ({"experts": self.experts} if self.experts else {})


@dataclass(frozen=True)
class Budget:
    """How many units per block each group keeps. `sparsity`: the share of what the budget counts
    that this removes; `scope`: parameters in scope.
    """

    keep: dict[str, int]
    ratio: float
    sparsity: float
    scope: int


def allocate(
    deps: DependencyGraph,
    groups: list[Group],
    sparsity: float,
    align: int = 1,
    min_keep: int = 1,
    fixed: Mapping[str, int] | None = None,
    lean: Mapping[str, float] | None = None,
    cost: Cost | None = None,
) -> Budget:
    """Counts that remove the share `sparsity` of `cost` (parameters, if None) with one ratio, times
    `lean` (group name -> factor); `fixed` counts are given. BudgetError states the largest
    feasible one. Of parameters the nearest share counts, of time the next that is enough.
    """
    if not groups:
        raise BudgetError("no group can be pruned · help: fasp-graph inspect lists the reasons")
    cost = cost or parameter_cost(deps, groups)
    if not cost.total:
        raise BudgetError(
            "no parameter can be pruned: they are plain tensors · help: make them nn.Parameter"
        )
    if not 0 < sparsity < 1:
        raise BudgetError(
            f"sparsity {sparsity} is not between 0 and 1 · help: it is a share, say 0.3"
        )

    multiple = steps(deps, groups, align)

    def at(ratio: float) -> tuple[dict[str, int], float]:
        by = {g.name: min(1.0, ratio * leans.get(g.name, 1.0)) for g in groups}
        keep = {g.name: _count(g, by[g.name], multiple[g.name], min_keep) for g in groups}
        keep |= dict(fixed or {})
        return keep, cost.removed(keep)

    leans = lean or {}
    most = 1 / min([1.0, *leans.values()])
    _, largest = at(most)
    if largest < sparsity:
        raise cost.unreachable(sparsity, largest, min_keep, align)
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if at(middle)[1] < sparsity else (low, middle)
    near = (high,) if cost.measured else (low, high)
    ratio = min(near, key=lambda r: abs(at(r)[1] - sparsity))
    keep, reached = at(ratio)
    return Budget(keep, ratio, reached, scope_size(deps))


def _count(group: Group, ratio: float, step: int, min_keep: int) -> int:
    size = group.size // group.blocks
    count, floor = round((1 - ratio) * size), least(group, min_keep)
    if count < size:
        count = max(round(count / step), -(-floor // step)) * step
    return max(min(count, size), floor)


def steps(deps: DependencyGraph, groups: list[Group], align: int) -> dict[str, int]:
    """Group name -> what its kept counts per block are multiples of, so that all blocks together
    keep a multiple of `align`; 1 where a block has fewer than four such steps. Chains inside
    stacked weights, one matrix for each expert, keep a multiple of ROWS as well.
    """
    routed = [g for g in deps.groups if g.kind == "head" and not g.consumers]
    stacked = {m.parameter for g in routed for m in g.members if m.dim == 0}
    stacked = {name for name in stacked if len(deps.parameters.get(name, ())) == 3}
    return {g.name: _step(g, align, stacked) for g in groups}


def _step(group: Group, align: int, stacked: Container[str]) -> int:
    found, size = align // math.gcd(align, group.blocks), group.size // group.blocks
    if group.kind == "chain" and any(m.parameter in stacked and m.dim > 0 for m in group.members):
        wide = math.lcm(found, ROWS)
        found = wide if size >= 4 * wide else found
    return found if group.blocks == 1 or size >= 4 * found else 1


def least(group: Group, min_keep: int) -> int:
    """Units that a block keeps at least: as asked, and as many as a router chooses."""
    size = group.size // group.blocks
    return min(max(min_keep, -(-group.least // group.blocks)), size)


def select(group: Group, utility: Tensor, keep: int) -> tuple[int, ...]:
    """The `keep` units of greatest utility [size] in each block; ties go to the lower index. No
    piece of the axis is left empty (passes/pieces.py).
    """
    block = torch.tensor(group.block_of)
    chosen: list[int] = []
    for number in range(group.blocks):
        units = torch.nonzero(block == number).reshape(-1)
        order = utility.cpu()[units].argsort(descending=True, stable=True)
        chosen += units[order[:keep]].tolist()
    return with_every_piece(group, chosen, utility.tolist())
