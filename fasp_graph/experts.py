"""Each expert keeps its own best units, as many as the others (passes/experts.py).

Scores and repairs are those of any consumer, for each expert by itself on the tokens that were sent
to it; an expert that saw none, or none with inputs other than zero, is scored by its weights and
not repaired.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from passes.consumers import staying, units_along
from passes.couple import Group
from passes.eliminate import Problem, eliminate
from passes.experts import ExpertView
from passes.observe import Moments, Walk
from passes.rewrite import attribute
from passes.score import GREEDY, NEEDS_DATA, interactions, last_masked, score

from .refit import folds, refit, whole
from .worth import Job, damped

UNKNOWN = (math.nan, math.nan)


def order_of(utility: Tensor, keep: int) -> list[int]:
    """The `keep` units of greatest utility in their order, then the others; ties go to the lower
    index.
    """
    best = set(utility.argsort(descending=True, stable=True)[:keep].tolist())
    units = range(len(utility))
    return sorted(units, key=lambda unit: (unit not in best, unit))


def weight_orders(job: Job, group: Group, keep: int) -> list[list[int]]:
    """By the root of the sum of squares that a unit has in its expert's consumers (at random for
    score=random).
    """
    consuming = {(c.parameter, c.dim) for c in group.consumers}
    total: Tensor | None = None
    for member in group.members:
        if (member.parameter, member.dim) not in consuming:
            continue
        weight = attribute(job.captured.graph_module, member.parameter).detach().double()
        squares = weight.square().movedim(member.dim, 1).flatten(2).sum(2).cpu()
        mine = squares[:, torch.from_numpy(member.indices)].sum(2)
        total = mine if total is None else total + mine
    assert total is not None
    if job.config.passes.score == "random":
        total = torch.rand(total.shape, generator=job.generator, dtype=torch.float64)
    return [order_of(each, keep) for each in total]


@dataclass(frozen=True)
class Settled:
    """The order of each expert's units, the mean errors without and with repair, the tokens of the
    expert that saw fewest (0: none saw any) and the channels of all; `untold`: experts of which
    the data tell nothing, with their tokens; `ridges`: those that were chosen on held-out tokens.
    """

    orders: list[list[int]]
    errors: tuple[float, float]
    seen: tuple[int, int]
    untold: dict[int, int]
    ridges: tuple[float, ...]


def settle_experts(job: Job, group: Group, view: ExpertView, state: Walk, keep: int) -> Settled:
    """Choose and repair; the repaired weight, its units where they were, goes to the walk."""
    weight = state.weight(view.parameter).detach()
    parts = list(zip(*(view.moments(state, part) for part in folds(job.config)), strict=True))
    every, matrices = [whole(held) for held in parts], view.matrices(weight)
    new, orders, errors = [], [], []
    ridges: list[float] = []
    unit = units_along(group, view.parameter, view.dim, weight)
    found = [moments if moments.tell(unit >= 0) else None for moments in every]
    for matrix, seen, held in zip(matrices, found, parts, strict=True):
        order = _order(job, matrix, seen, unit, group.size, keep)
        orders.append(order)
        mask = staying(group, order[:keep], unit)
        if seen is None:
            new.append(matrix * mask)
            continue
        result, chosen = refit(job.config, matrix, None, held, mask)
        new.append(result.weight)
        errors.append((result.error_before, result.error_after))
        ridges += chosen
    state.weights[view.parameter] = view.weight(torch.stack(new))
    before, after = torch.tensor(errors or [UNKNOWN], dtype=torch.float64).mean(0).tolist()
    least = min((seen.tokens for seen in found if seen), default=0)
    untold = {e: every[e].tokens for e, seen in enumerate(found) if seen is None}
    return Settled(orders, (before, after), (least, matrices.shape[-1]), untold, tuple(ridges))


def _order(
    job: Job, matrix: Tensor, moments: Moments | None, unit: Tensor, size: int, keep: int
) -> list[int]:
    method, mine = job.config.passes.score, unit >= 0
    if moments is None and method in NEEDS_DATA:
        method = "magnitude"
    if method in GREEDY and moments is not None:
        second = damped(moments.gram.double() / moments.tokens, job.config.damping)
        found = eliminate([Problem(matrix.double(), second, unit)], [0] * size, size - keep)
        stays = torch.ones(size)
        stays[list(found.order)] = 0
        return order_of(stays, keep)
    if method == "numerical" and moments is not None:
        return order_of(last_masked(interactions(matrix, moments, unit, size)).cpu(), keep)
    columns = score(method, matrix, moments, job.generator)
    utility = torch.zeros(size, dtype=torch.float64)
    return order_of(utility.index_add_(0, unit[mine].cpu(), columns[mine].cpu()), keep)
