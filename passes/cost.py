"""cost: what a budget counts, and how much of it is gone when groups keep fewer units.

    left(keep) = sum_i size_i prod_f (1 - sum_l lost_ifl(keep_l))

item     i: a weight, its size in parameters, or an op, its size in measured seconds
factor   f: a dim of a weight; groups on one dim add up, groups on several dims multiply, and so do
         whole blocks and what is inside blocks
lost     share of item i that goes when group l alone keeps keep_l units per block: linear between
         the counts where it is known, which for parameters are none and all
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .errors import BudgetError
from .groups import DependencyGraph, Group

DIGITS = 14  # of a share: rounding of sums does not decide whether a budget is met


@dataclass(frozen=True)
class Lost:
    """`shares[n]` of an item goes where `group` keeps `counts[n]` (ascending) units per block."""

    group: str
    factor: tuple[int, int]
    counts: tuple[int, ...]
    shares: tuple[float, ...]


@dataclass(frozen=True)
class Item:
    """What costs `size` as it is, and what groups take off it."""

    size: float
    lost: tuple[Lost, ...] = ()

    def gone(self, keep: Mapping[str, Any]) -> Any:
        """What goes, at a count or at an array of counts for each group of `keep`."""
        shares: dict[tuple[int, int], Any] = {}
        for part in self.lost:
            if part.group in keep:
                share = np.interp(keep[part.group], part.counts, part.shares)
                shares[part.factor] = shares.get(part.factor, 0.0) + share
        return self.size * (1 - math.prod(1 - share for share in shares.values()))


@dataclass(frozen=True)
class Cost:
    """All items of a budget; `total`: what they and all else in scope cost. `measured`: in seconds,
    not in parameters; `untimed`: weights of ops that could not be measured, and count nothing.
    """

    items: tuple[Item, ...]
    total: float
    measured: bool = False
    untimed: tuple[str, ...] = ()

    def removed(self, keep: Mapping[str, int]) -> float:
        """The share of the total that goes when each group keeps `keep` units per block."""
        gone = sum(float(item.gone(keep)) for item in self.items)
        return round(gone / self.total, DIGITS)

    def alone(self, group: Group, keep: Sequence[int]) -> np.ndarray:
        """The same for one group, at each of several counts."""
        counts = {group.name: np.asarray(keep)}
        mine = [item for item in self.items if any(p.group == group.name for p in item.lost)]
        return np.asarray(sum((item.gone(counts) for item in mine), np.zeros(len(keep)))) / (
            self.total
        )

    def unreachable(self, asked: float, largest: float, min_keep: int, align: int) -> BudgetError:
        """The error for a share that cannot be removed."""
        of = " of the measured time" if self.measured else ""
        return BudgetError(
            f"sparsity {asked:g}{of} cannot be reached: {math.floor(1000 * largest) / 1000:g} is "
            f"the largest with min_keep={min_keep} and align={align} · help: ask for less, or "
            "prune more kinds of groups"
        )


def parameter_cost(deps: DependencyGraph, groups: Sequence[Group]) -> Cost:
    """Every weight that a group lies on, of all parameters in scope."""
    lost: dict[str, list[Lost]] = {}
    for group, member in ((g, m) for g in groups for m in g.members):
        if member.parameter in deps.parameters:  # else a buffer
            size = group.size // group.blocks
            share = member.indices.size / deps.parameters[member.parameter][member.dim]
            part = Lost(group.name, (member.dim, group.layer), (0, size), (share, 0.0))
            lost.setdefault(member.parameter, []).append(part)
    items = (Item(numel(deps.parameters[name]), tuple(parts)) for name, parts in lost.items())
    return Cost(tuple(items), scope_size(deps))


def isotonic(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values`: max_{i <= k} min_{j >= k} mean(i..j)."""
    places = range(len(values))

    def mean(first: int, last: int) -> float:
        return sum(values[first : last + 1]) / (last + 1 - first)

    return [max(min(mean(i, j) for j in places[k:]) for i in places[: k + 1]) for k in places]


def scope(deps: DependencyGraph) -> set[str]:
    """Names of the parameters that the sparsity is measured on: of modules with a chain, bilinear
    or head group; of those with a width group where there is none.
    """
    inner = [group for group in deps.groups if group.kind in ("chain", "bilinear", "head")]
    wide = [group for group in deps.groups if group.kind == "width"]
    owners = {
        member.parameter.rpartition(".")[0] for group in inner or wide for member in group.members
    }
    return {name for name in deps.parameters if name.rpartition(".")[0] in owners}


def scope_size(deps: DependencyGraph) -> int:
    """Parameters in scope."""
    return sum(numel(deps.parameters[name]) for name in scope(deps))


def numel(shape: tuple[int, ...]) -> int:
    """How many elements a tensor of this shape has."""
    return int(torch.Size(shape).numel())
