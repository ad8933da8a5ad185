"""rotate: another basis for the units of a group between whose producers and consumers all is
linear (symmetry "invertible": V and O of attention, low-rank pairs).

    x = Q x' in every block, Q orthogonal:    producers Q^T W, Q^T b;    consumers W Q

is the same function for any Q, so units of the new basis can go in place of channels. Every member
of the group turns alike: w'_e = sum_d Q_de w_d along its dim. What a basis should leave out, per
block, are the directions r of least s in

    M r = s D r,    M = sum_c W_c^T W_c    over consumers and the columns c of a unit (the query
                                           heads of a KV head)

    joint   D = sum_c [S^-1]_cc    s: error of leaving out r, all else of all blocks refitted
    apart   D = [sum_c S_cc]^-1    s: error of leaving out r, the block itself refitted: squared
            singular values of W_O L, S = L L^T, as in MoDeGPT's V/O (arXiv 2408.09632)

with S the second moments of the consumer's input. The r are not orthogonal; once it is known which
stay, Q becomes an orthonormal basis of what they span, and of the rest. That the law holds is tried
on the model (passes/unchanged.py), with random Q, before anything relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule

from .capture import Args
from .drift import Drift
from .eliminate import Problem
from .groups import Group
from .observe import Moments
from .unchanged import Moves, unchanged


@dataclass(frozen=True)
class Basis:
    """R of every block [blocks, d, d], x = R x', and s of every unit of it [size]."""

    group: Group
    matrix: Tensor
    worth: Tensor

    def problem(self, held: Problem) -> Problem:
        """The consumer in this basis."""
        columns, back = columns_of(self.group, held.unit_of), torch.linalg.inv(self.matrix).mT
        second = turned(turned(held.second, 0, columns, back), 1, columns, back)
        return replace(
            held,
            weight=turned(held.weight, 1, columns, self.matrix),
            second=(second + second.T) / 2,
        )

    def orthogonal(self, kept: Iterable[int]) -> Tensor:
        """Q [blocks, d, d]: of the kept units, then of the others, where these stand."""
        stays = torch.zeros(self.group.size, dtype=torch.bool)
        stays[list(kept)] = True
        found, back = torch.zeros_like(self.matrix), torch.linalg.inv(self.matrix)
        for block, units in enumerate(blocks_of(self.group)):
            keep = stays[units].to(back.device)
            full = torch.linalg.qr(back[block, keep].T, mode="complete").Q
            found[block][:, keep] = full[:, : int(keep.sum())]
            found[block][:, ~keep] = full[:, int(keep.sum()) :]
        return found


def basis(group: Group, problems: Sequence[Problem], joint: bool) -> Basis:
    """The basis for consumers with their (damped) second moments."""
    gram, metric = torch.zeros(()), torch.zeros(())
    for held in problems:
        columns, weight = columns_of(group, held.unit_of), held.weight.double()
        second = held.second.double()
        own = torch.cholesky_inverse(torch.linalg.cholesky(second)) if joint else second
        mine = sum(_squares(own, at) for at in columns.unbind(-1))
        parts = weight[:, columns]
        gram = gram.to(weight) + torch.einsum("obdp,obep->bde", parts, parts)
        metric = metric.to(weight) + (mine if joint else torch.linalg.inv(mine))
    half = torch.linalg.cholesky(metric)  # D = L L^T, r = L^-T v
    inside = torch.linalg.solve_triangular(half, gram, upper=False)
    inside = torch.linalg.solve_triangular(half, inside.mT, upper=False)
    values, vectors = torch.linalg.eigh((inside + inside.mT) / 2)
    matrix = torch.linalg.solve_triangular(half.mT, vectors, upper=True)
    worth = torch.zeros(group.size, dtype=torch.float64)
    for units, of_block in zip(blocks_of(group), values.clamp_min(0).cpu(), strict=True):
        worth[units] = of_block
    return Basis(group, matrix, worth)


def _squares(matrix: Tensor, columns: Tensor) -> Tensor:
    """The part of `columns` [blocks, d] with themselves, [blocks, d, d]."""
    return matrix[columns[:, :, None], columns[:, None, :]]


def blocks_of(group: Group) -> Tensor:
    """Units of every block, [blocks, d]."""
    return torch.from_numpy(group.block_of).argsort(stable=True).reshape(group.blocks, -1)


def columns_of(group: Group, unit_of: Tensor) -> Tensor:
    """Columns of every unit, [blocks, d, columns of a unit]; `unit_of`: -1 where it has none."""
    order = torch.where(unit_of >= 0, unit_of, group.size).argsort(stable=True)
    columns = order[: int((unit_of >= 0).sum())].reshape(group.size, -1)
    return columns[blocks_of(group).to(columns.device)]


def turned(held: Tensor, dim: int, columns: Tensor, maps: Tensor) -> Tensor:
    """new_e = sum_d maps[block, d, e] old_d along `dim`, at `columns` [blocks, d, any]."""
    old = held.movedim(dim, 0)
    parts = torch.einsum("bdp...,bde->bep...", old[columns].to(maps), maps)
    return old.index_put((columns,), parts.to(old.dtype)).movedim(0, dim)


def turned_moments(found: Moments, columns: Tensor, maps: Tensor) -> Moments:
    """Of x' = Q^T x."""
    gram = turned(turned(found.gram.double(), 0, columns, maps), 1, columns, maps)
    mean = turned(found.mean.double(), 0, columns, maps)
    return Moments(gram.to(found.gram), mean.to(found.mean), found.tokens)


def turned_drift(found: Drift, columns: Tensor, maps: Tensor) -> Drift:
    """Of x' = Q^T x."""
    return replace(found, cross=turned(found.cross, 1, columns, maps))


def turns(groups: Iterable[Group], maps: dict[str, Tensor]) -> Moves:
    """Parameter -> what turns it, for the groups that `maps` has."""
    steps: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for group in (group for group in groups if group.name in maps):
        for member in group.members:
            columns = torch.from_numpy(member.indices)[blocks_of(group)]
            steps.setdefault(member.parameter, []).append((member.dim, columns, maps[group.name]))

    def move(mine: list[tuple[int, Tensor, Tensor]]) -> Callable[[Tensor], Tensor]:
        def moved(weight: Tensor) -> Tensor:
            for dim, columns, q in mine:
                weight = turned(weight, dim, columns.to(weight.device), q.to(weight.device))
            return weight

        return moved

    return {name: move(mine) for name, mine in steps.items()}


def rotatable(
    module: GraphModule, groups: Sequence[Group], inputs: Args, seed: int
) -> frozenset[str]:
    """Names of the groups for which the law was seen to hold at the example inputs."""
    found = [g for g in groups if g.symmetry == "invertible" and g.consumers]
    if not found or _holds(module, found, inputs, seed):
        return frozenset(group.name for group in found)
    return frozenset(group.name for group in found if _holds(module, [group], inputs, seed))


def _holds(module: GraphModule, groups: Sequence[Group], inputs: Args, seed: int) -> bool:
    draw = torch.Generator().manual_seed(seed)
    maps = {}
    for group in groups:
        size = group.size // group.blocks
        drawn = torch.randn(group.blocks, size, size, generator=draw, dtype=torch.float64)
        maps[group.name] = torch.linalg.qr(drawn).Q
    return unchanged(module, turns(groups, maps), inputs)
