"""worth: what the units of a group are worth, by score, by elimination, and their error curves.

problem    a consumer for elimination: its matrix, in the metric of the outputs where there is one,
           and the second moments of its inputs
curve      E(k): the error of removing k units from every block (passes/allocate.py)
utility    score per unit, summed over consumers and over the columns of the unit
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.capture import Captured
from passes.consumers import unit_columns
from passes.couple import DependencyGraph, Group
from passes.eliminate import Problem, eliminate
from passes.experts import ExpertView
from passes.gates import Gates
from passes.observe import Moments, Walk
from passes.rewrite import attribute
from passes.rotate import Basis, basis
from passes.score import interactions, last_masked, score
from passes.sensitivity import Sensed, factor
from passes.views import View

from .config import Config

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """What every step needs to know. `experts`: the groups of which each expert keeps its own
    units, with their consumer where its inputs can be told by expert. `gates`: what the program
    has for groups under a mean (passes/gates.py). `rotatable`: groups that choose in a basis of
    their own (passes/rotate.py).
    """

    captured: Captured
    deps: DependencyGraph
    gates: Gates
    config: Config
    views: dict[str, list[View]]
    experts: dict[str, ExpertView | None]
    sensed: dict[str, Sensed]
    generator: torch.Generator
    rotatable: frozenset[str] = frozenset()

    @property
    def weighed(self) -> bool:
        """Whether errors are measured in the metric of the model's outputs: it reaches them all."""
        return bool(self.sensed) and not self.unreached

    @property
    def unreached(self) -> list[str]:
        """Weights of consumers that tokens reach, and no gradient of the outputs."""
        held = [view for several in self.views.values() for view in several]
        known = [(view, self.sensed.get(view.node.name)) for view in held]
        return [v.parameter for v, s in known if s and s.moments.tokens and s.metric is None]


def cosines_of(job: Job, groups: list[Group]) -> dict[str, float]:
    """How little each group's block turns the residual stream (passes/allocate.py, `leans`)."""
    found = {}
    for group in groups:
        held = [job.sensed[view.node.name].cosine for view in job.views[group.name]]
        known = [cosine for cosine in held if cosine is not None]
        if known:
            found[group.name] = sum(known) / len(known)
    return found


def curves_of(
    job: Job, groups: list[Group], progress: Progress | None
) -> dict[str, tuple[float, ...]]:
    """Error of k = 0, 1, ... removed units per block for every group with matrix consumers of
    which the sensed batches tell something.
    """
    curves = {}
    for number, group in enumerate(groups):
        names = [view.node.name for view in job.views[group.name]]
        moments = told(job, group, {name: job.sensed[name].moments for name in names}, _dense(job))
        if moments:
            curves[group.name] = _curve(job, group, moments)
        if progress:
            progress("curves", number + 1, len(groups))
    return curves


def _curve(job: Job, group: Group, moments: dict[str, Moments]) -> tuple[float, ...]:
    per = group.size // group.blocks
    if job.config.passes.allocation == "standardised":
        utility = utility_of(job, group, moments, _dense(job))
        standard = (utility - utility.mean()) / utility.std().clamp_min(1e-12)
        steps = torch.stack([standard[_of(group, b)].sort().values for b in range(group.blocks)])
        # a threshold on standardised scores; shifted, so that the sums rise
        sums = (steps.sum(0) + 10 * group.blocks).cumsum(0)[: per - 1]
        return (0.0, *sums.tolist())
    removals = per - min(job.config.min_keep, per)
    problems = problems_of(job, group, moments, _dense(job))
    turned = basis_of(job, group, problems)
    problems = [turned.problem(held) for held in problems] if turned else problems
    errors = eliminate(problems, group.block_of.tolist(), removals, even=True).errors
    return (0.0, *errors[group.blocks - 1 :: group.blocks])


def _of(group: Group, block: int) -> Tensor:
    return torch.tensor(group.block_of) == block


def _dense(job: Job) -> Walk:
    return Walk(job.captured.graph_module, [])


def told(job: Job, group: Group, moments: dict[str, Moments], state: Walk) -> dict[str, Moments]:
    """Of the consumers' moments those that tell what the group's units are worth."""
    held = {view: state.held(view.parameter) for view in job.views[group.name]}
    units = {view.node.name: unit_columns(group, view, weight) for view, weight in held.items()}
    return {name: found for name, found in moments.items() if found.tell(units[name] >= 0)}


def problems_of(job: Job, group: Group, moments: dict[str, Moments], state: Walk) -> list[Problem]:
    """The consumers with moments, for elimination: in the metric of the outputs where there is
    one, else relative to their outputs.
    """
    problems = []
    views = [view for view in job.views[group.name] if view.node.name in moments]
    metrics = {v: job.sensed[v.node.name].metric for v in views} if job.weighed else {}
    weighed = all(metric is not None for metric in metrics.values())
    for view in views:
        weight = state.weight(view.parameter).detach()
        matrix = view.matrix(weight).double()
        found = moments[view.node.name]
        second = found.gram.double() / found.tokens
        metric = metrics.get(view) if weighed else None
        if metric is not None:
            matrix = factor(metric) @ matrix
        else:
            power = torch.einsum("oi,ij,oj->", matrix, second, matrix)
            matrix = matrix / power.clamp_min(1e-300).sqrt()
        unit = unit_columns(group, view, weight)
        problems.append(Problem(matrix, damped(second, job.config.damping), unit))
    return problems


def basis_of(job: Job, group: Group, problems: list[Problem]) -> Basis | None:
    """The basis that the group's units are chosen in; None: their own."""
    if group.name not in job.rotatable:
        return None
    return basis(group, problems, joint=job.config.passes.score == "rotation")


def damped(second: Tensor, ridge: float) -> Tensor:
    """Second moments that can be inverted."""
    damping = max(ridge, 1e-6) * second.diagonal().mean().clamp_min(1e-12)
    return second + damping * torch.eye(len(second), dtype=second.dtype, device=second.device)


def utility_of(job: Job, group: Group, moments: dict[str, Moments], state: Walk) -> Tensor:
    """Score per unit [size]: summed over consumers with moments and over the unit's columns."""
    utility = torch.zeros(group.size, dtype=torch.float64)
    method, together = job.config.passes.score, torch.zeros(())
    for view in (held for held in job.views[group.name] if held.node.name in moments):
        weight = state.weight(view.parameter).detach()
        unit = unit_columns(group, view, weight)
        found = moments[view.node.name]
        if method == "numerical":
            held = interactions(view.matrix(weight), found, unit, group.size)
            together = together.to(held) + held
            continue
        sensed = job.sensed.get(view.node.name)
        metric = sensed.metric if sensed else None
        columns = score(method, view.matrix(weight), found, job.generator, metric)
        mine = unit >= 0
        utility.index_add_(0, unit[mine].cpu(), columns[mine].cpu())
    return last_masked(together) if method == "numerical" else utility


def weight_utility(
    module: GraphModule, group: Group, scoring: str, generator: torch.Generator
) -> Tensor:
    """Without statistics: sqrt of the sum of squares of every weight that a unit owns (or
    random).
    """
    if scoring == "random":
        return torch.rand(group.size, generator=generator, dtype=torch.float64)
    total = torch.zeros(group.size, dtype=torch.float64)
    consuming = {(c.parameter, c.dim) for c in group.consumers if c.parameter}
    for member in group.members:
        if consuming and (member.parameter, member.dim) not in consuming:
            continue
        weight = attribute(module, member.parameter).detach().double()
        squares = (
            weight.square().movedim(member.dim, 0).flatten(1).sum(1)
            if weight.dim() > 1
            else weight.square()
        )
        total += squares.cpu()[torch.from_numpy(member.indices)].sum(1)
    return total.sqrt()
