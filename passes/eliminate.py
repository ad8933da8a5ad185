"""eliminate: greedy removal of units with exact downdates (optimal brain surgeon, structured).

Consumer Y = X W^T, W [out, in], S = X^T X / tokens + ridge, D = S^-1. A unit u owns columns u of W.

    s_u = tr(W_u [D_uu]^-1 W_u^T)            error of removing u, the other columns refitted
    remove the least; W -= W_u [D_uu]^-1 D_u: ; D -= D_:u [D_uu]^-1 D_u:
    E(k) = s_(1) + ... + s_(k)               exact: equals tr(W_P [(S^-1)_PP]^-1 W_P^T) of all k

A unit with several columns (the query heads of a KV head, the kernel of a convolution) goes by its
joint error, and with several consumers by the sum of their errors. To weigh output directions by a
metric A = L L^T [out, out], give L^T W instead of W.

Blocks of `batch` removals: the exact greedy runs inside the 4 * batch units of least s, then W and
D are downdated once; with at most that many units the whole run is exact. Sources: ZipLM
(arXiv 2302.04089), SlimGPT (arXiv 2412.18110), OSSCAR (arXiv 2403.12983).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HOST = 256  # columns; a step on so few takes a GPU longer to start than a processor to do


@dataclass(frozen=True)
class Problem:
    """A consumer: weight [out, in], damped second moments [in, in], unit_of [in] (-1: no unit)."""

    weight: Tensor
    second: Tensor
    unit_of: Tensor


@dataclass(frozen=True)
class Elimination:
    """Units in the order in which they go; `errors[k]`: E after k + 1 removals."""

    order: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass
class _State:
    """Columns sorted by unit, `per` a unit, columns of no unit last; gone units are zero."""

    weight: Tensor
    inverse: Tensor
    per: int

    def columns(self, units: Tensor) -> Tensor:
        """The columns of `units`, in their order."""
        steps = torch.arange(self.per, device=units.device)
        return (units[:, None] * self.per + steps).reshape(-1)


def eliminate(
    problems: Sequence[Problem],
    block_of: Sequence[int],
    removals: int,
    even: bool = False,
    batch: int = 32,
) -> Elimination:
    """Remove `removals` units from every block.

    With `even`, no block is ever more than one unit ahead of another, so that errors at multiples
    of the number of blocks are those of shapes that can be kept.
    """
    device = problems[0].weight.device
    block = torch.tensor(block_of, device=device)
    blocks = int(block.max()) + 1
    states = [_state(problem, len(block_of)) for problem in problems]
    count = torch.zeros(blocks, dtype=torch.long, device=device)
    alive = torch.ones(len(block), dtype=torch.bool, device=device)
    exact = len(block) <= 4 * batch
    step = len(block) if exact else max(batch // blocks, 1) * blocks
    order: list[int] = []
    errors: list[float] = []
    while len(order) < removals * blocks:
        free = alive & (count < removals)[block]
        units = _candidates(states, free, block, blocks, step, even, exact)
        found = _greedy(states, units, block, count, removals, even, step)
        gone = units[[unit for unit, _ in found]]
        for _, error in found:
            errors.append(error + (errors[-1] if errors else 0.0))
        order += gone.tolist()
        alive[gone] = False
        count += torch.bincount(block[gone], minlength=blocks)
        for state in states:
            _downdate(state, gone)
    return Elimination(tuple(order), tuple(errors))


def _state(problem: Problem, units: int) -> _State:
    owned = problem.unit_of >= 0
    order = torch.where(owned, problem.unit_of, units).argsort(stable=True)
    second = problem.second.double()[order][:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(second))
    return _State(problem.weight.double()[:, order], inverse, int(owned.sum()) // units)


def _scores(gram: Tensor, inverse: Tensor, per: int) -> Tensor:
    """tr([D_uu]^-1 M_uu) for every unit; M = W^T W."""
    if per == 1:
        return gram.diagonal() / inverse.diagonal()
    units = len(inverse) // per
    at = torch.arange(units, device=gram.device)
    own = inverse.reshape(units, per, units, per)[at, :, at, :]
    mine = gram.reshape(units, per, units, per)[at, :, at, :]
    return torch.linalg.solve(own, mine).diagonal(dim1=1, dim2=2).sum(1)


def _candidates(
    states: list[_State],
    free: Tensor,
    block: Tensor,
    blocks: int,
    step: int,
    even: bool,
    exact: bool,
) -> Tensor:
    """The free units among which the next `step` removals are chosen."""
    if exact:
        return torch.nonzero(free).reshape(-1)
    total = torch.zeros(len(free), dtype=torch.float64, device=free.device)
    for state in states:
        total += _own_scores(state, free)
    total[~free] = float("inf")
    pools = [block == number for number in range(blocks)] if even else [torch.ones_like(free)]
    picked = []
    for pool in pools:
        order = torch.where(pool & free, total, float("inf")).argsort(stable=True)
        picked.append(order[: min(4 * step // len(pools), int((pool & free).sum()))])
    return torch.cat(picked).sort().values


def _own_scores(state: _State, free: Tensor) -> Tensor:
    """`_scores` of all units without the full W^T W; only the free ones mean anything."""
    units, per = len(free), state.per
    weight, inverse = state.weight[:, : units * per], state.inverse[: units * per, : units * per]
    if per == 1:
        own = torch.where(free, inverse.diagonal(), 1.0)
        return torch.linalg.vector_norm(weight, dim=0).square() / own
    at = torch.arange(units, device=free.device)
    weight = weight.reshape(-1, units, per)
    own = inverse.reshape(units, per, units, per)[at, :, at, :].clone()
    own[~free] = torch.eye(per, dtype=own.dtype, device=own.device)
    mine = torch.einsum("oua,oub->uab", weight, weight)
    return torch.linalg.solve(own, mine).diagonal(dim1=1, dim2=2).sum(1)


def _greedy(
    states: list[_State],
    units: Tensor,
    block: Tensor,
    count: Tensor,
    removals: int,
    even: bool,
    number: int,
) -> list[tuple[int, float]]:
    """Up to `number` exact removals inside `units`: (position in `units`, s) of each."""
    parts = []
    near = max(len(units) * state.per for state in states) <= HOST
    place = torch.device("cpu") if near else units.device
    for state in states:
        columns = state.columns(units)
        weight = state.weight[:, columns]
        held = (weight.T @ weight, state.inverse[columns][:, columns])
        parts.append((*(matrix.to(place) for matrix in held), state.per))
    counts, owner = count.to(place, copy=True), block[units].to(place)
    gone = torch.zeros(len(units), dtype=torch.bool, device=place)
    found: list[tuple[int, float]] = []
    while len(found) < number:
        limit = min(removals, int(counts.min()) + 1) if even else removals
        open_ = ~gone & (counts < limit)[owner]
        if not bool(open_.any()):
            break
        total = sum(_scores(gram, inverse, per) for gram, inverse, per in parts)
        unit = int(torch.where(open_, total, float("inf")).argmin())
        found.append((unit, float(total[unit])))
        gone[unit] = True
        counts[owner[unit]] += 1
        for gram, inverse, per in parts:
            _downdate_gram(gram, inverse, slice(unit * per, (unit + 1) * per))
    return found


def _downdate_gram(gram: Tensor, inverse: Tensor, at: slice) -> None:
    """M and D after the columns `at` are gone, in place: W' = W - W_u R, R = [D_uu]^-1 D_u:, so
    M' = M - H^T R - R^T H, H = M_u: - M_uu R / 2.
    """
    rows = inverse[at].clone()
    ratio = _solved(rows[:, at], rows)
    half = gram[at] - gram[at, at] @ ratio / 2
    gram.addmm_(half.T, ratio, alpha=-1).addmm_(ratio.T, half, alpha=-1)
    inverse.addmm_(rows.T, ratio, alpha=-1)
    _clear(inverse, at)


def _downdate(state: _State, units: Tensor) -> None:
    """W and D after `units` are gone, in place."""
    columns = state.columns(units)
    rows = state.inverse[columns]
    ratio = _solved(rows[:, columns], rows)
    state.weight.addmm_(state.weight[:, columns], ratio, alpha=-1)
    state.inverse.addmm_(rows.T, ratio, alpha=-1)
    _clear(state.inverse, columns)


def _solved(own: Tensor, rows: Tensor) -> Tensor:
    """[D_uu]^-1 D_u:."""
    return rows / own if len(own) == 1 else torch.linalg.solve(own, rows)


def _clear(inverse: Tensor, at: slice | Tensor) -> None:
    """Gone columns decouple; the ones on the diagonal keep later solves defined."""
    inverse[at] = 0
    inverse[:, at] = 0
    inverse.diagonal()[at] = 1
