"""decide: which units of each group go, and the weights of what stays.

    sense (dense statistics, metric) -> eliminate (error curves) -> allocate -> walk:
        at each consumer observe, score or eliminate, select, restore

With allocation=uniform the first three are skipped: the walk alone is one forward pass.
Cost in plain forward passes over the calibration batches, a backward pass counting as two:

    walk 1, the dense path beside it 1 (restore asymmetric, residual),
    sense: 1/2 of the batches x 3 (allocation sensitivity, score taylor) or x 1 (the others)

A single batch is halved along its rows; if it has but one, method="best" repairs with `affine`, so
that no default costs more than 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.allocate import allocate_by_error, leans
from passes.capture import Args, Captured, as_args
from passes.consumers import offset_of, unit_columns, views
from passes.couple import DependencyGraph, Group
from passes.drift import Twin, drift, twin
from passes.eliminate import Problem, eliminate
from passes.errors import CalibrationError, ConfigError
from passes.observe import Moments, Room, View, Walk, probe, walk
from passes.pieces import with_every_piece
from passes.removal import nodes_by_name
from passes.restore import TOWARDS, restore
from passes.rewrite import attribute
from passes.score import NEEDS_DATA, interactions, last_masked, score
from passes.select import Budget, allocate, select
from passes.sensitivity import Sensed, factor, sense

from .config import Config
from .emit.layout import Said, settled
from .scale.distributed import share, total, world
from .scale.journal import Journal, fingerprint, open_journal, watch
from .scale.microbatch import microbatches
from .scale.spill import Spill

Progress = Callable[[str, int, int], None]


@dataclass
class Decisions:
    """Filled group by group. `curves[name][k]`: error of removing k units per block;
    `forward_passes`: the cost, in plain forward passes over the calibration batches.
    """

    budget: Budget
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    forward_passes: float = 0.0
    probed: float = 0.0


@dataclass(frozen=True)
class _Job:
    """What every step needs to know."""

    captured: Captured
    config: Config
    views: dict[str, list[View]]
    sensed: dict[str, Sensed]
    generator: torch.Generator

    @property
    def weighed(self) -> bool:
        """Whether errors are measured in the metric of the model's outputs."""
        return any(s.metric is not None for s in self.sensed.values())


def decide(
    captured: Captured,
    deps: DependencyGraph,
    groups: list[Group],
    calibration: Iterable[Any] | None,
    config: Config,
    progress: Progress | None = None,
    shared: list[Said] | None = None,
    work: Path | None = None,
) -> Decisions:
    """Plan and repair; BudgetError and CalibrationError say what is missing. `shared`: groups
    that must keep equally many units. `work`: folder of the journal.
    """
    shared = shared or []
    budget = allocate(deps, groups, config.sparsity, config.align, config.min_keep)
    budget = settled(deps, groups, budget, shared, config)
    nodes = nodes_by_name(captured.graph_module.graph.nodes)
    found = {group.name: views(group, deps, nodes) for group in groups}
    every = _batches(calibration, config) if _needs_data(config) else []
    key = fingerprint(captured.graph_module, every, config) if work else ""
    batches, config = _affordable(captured, _share(every, config) if every else [], config)
    batches = microbatches(captured, batches, config.max_memory)
    job = _Job(
        captured,
        config,
        found,
        _sense(captured, found, batches, config),
        torch.Generator().manual_seed(config.seed),
    )
    decided = Decisions(budget)
    if config.passes.allocation == "influence":
        factors = leans(_cosines(job, groups))
        budget = allocate(
            deps, groups, config.sparsity, config.align, config.min_keep, lean=factors
        )
        decided.budget = settled(deps, groups, budget, shared, config)
    elif config.passes.allocation != "uniform":
        decided.curves = _curves(job, groups, progress)
    if decided.curves:
        decided.budget = allocate_by_error(
            deps,
            groups,
            budget,
            decided.curves,
            config.sparsity,
            config.align,
            config.min_keep,
            per_unit=config.passes.allocation == "standardised",
        )
        decided.budget = settled(deps, groups, decided.budget, shared, config)
    journal = open_journal(work, key, captured.graph_module) if work else None
    _walk(job, groups, batches, decided, progress, journal)
    decided.forward_passes = _cost(config, len(batches)) + decided.probed
    return decided


def _needs_data(config: Config) -> bool:
    passes = config.passes
    return passes.score in NEEDS_DATA or passes.restore != "none" or passes.allocation != "uniform"


def _batches(calibration: Any, config: Config) -> list[Args]:
    if calibration is None:
        p = config.passes
        raise CalibrationError(
            f"score={p.score}, restore={p.restore}, allocation={p.allocation} need calibration "
            "batches · help: pass calibration, or method='magnitude'"
        )
    if isinstance(calibration, (str, bytes, Tensor)) or not hasattr(calibration, "__iter__"):
        raise CalibrationError(
            f"calibration is {type(calibration).__name__}, not an iterable of batches · help: "
            f"give a list of inputs"
        )
    batches = [as_args(batch) for batch in calibration]
    if not batches:
        raise CalibrationError("calibration is empty · help: give at least one batch of inputs")
    return batches


def _share(batches: list[Args], config: Config) -> list[Args]:
    """This process's batches. What compares with the dense path is not summed over processes."""
    passes = config.passes
    if world()[1] > 1 and (_sensing(config) or passes.restore in TOWARDS):
        raise ConfigError(
            f"score={passes.score}, restore={passes.restore}, allocation={passes.allocation} run "
            "in one process only · help: method='fasp' or 'slimgpt' under torchrun"
        )
    return share(batches)


def _affordable(
    captured: Captured, batches: list[Args], config: Config
) -> tuple[list[Args], Config]:
    """A single batch in halves, so that sensing costs half of it; else without the dense path."""
    if len(batches) != 1 or not _backward(config) or config.passes.restore not in TOWARDS:
        return batches, config
    leaves = pytree.tree_leaves(batches[0])
    lengths = {len(v) if isinstance(v, Tensor) and v.dim() else 0 for v in leaves}
    dynamic = captured.dynamic_shapes is not None
    rows = lengths.pop() if len(lengths) == 1 else 0
    if dynamic and rows > 1:
        halves = (slice(0, -(-rows // 2)), slice(-(-rows // 2), rows))
        return [pytree.tree_map(lambda v, h=h: v[h], batches[0]) for h in halves], config
    return batches, config if config.restore else replace(config, restore="affine")


def _backward(config: Config) -> bool:
    """Whether the metric of the outputs is needed."""
    return config.passes.allocation == "sensitivity" or config.passes.score == "taylor"


def _cosines(job: _Job, groups: list[Group]) -> dict[str, float]:
    found = {}
    for group in groups:
        held = [job.sensed[view.node.name].cosine for view in job.views[group.name]]
        known = [cosine for cosine in held if cosine is not None]
        if known:
            found[group.name] = sum(known) / len(known)
    return found


def _room(config: Config) -> Room:
    settle = None if config.max_memory is None else Spill(config.max_memory)
    return Room(total, settle)


def _sense(
    captured: Captured, found: dict[str, list[View]], batches: list[Args], config: Config
) -> dict[str, Sensed]:
    """Dense statistics on every other batch, where they are needed."""
    if not _sensing(config):
        return {}
    sites = [view for several in found.values() for view in several]
    return sense(captured.graph_module, batches[::2], sites, config.seed, _backward(config))


def _sensing(config: Config) -> bool:
    return config.passes.allocation != "uniform" or config.passes.score == "taylor"


def _cost(config: Config, batches: int) -> float:
    passes = config.passes
    if not batches:
        return 0.0
    share = len(range(0, batches, 2)) / batches if _sensing(config) else 0.0
    return 1.0 + (passes.restore in TOWARDS) + share * (3 if _backward(config) else 1)


def _curves(
    job: _Job, groups: list[Group], progress: Progress | None
) -> dict[str, tuple[float, ...]]:
    """Error of k = 0, 1, ... removed units per block for every group with matrix consumers."""
    curves = {}
    for number, group in enumerate(groups):
        if job.views[group.name]:
            moments = {
                view.node.name: job.sensed[view.node.name].moments for view in job.views[group.name]
            }
            curves[group.name] = _curve(job, group, moments)
        if progress:
            progress("curves", number + 1, len(groups))
    return curves


def _curve(job: _Job, group: Group, moments: dict[str, Moments]) -> tuple[float, ...]:
    per = group.size // group.blocks
    if job.config.passes.allocation == "standardised":
        utility = _utility(job, group, moments, _dense(job))
        standard = (utility - utility.mean()) / utility.std().clamp_min(1e-12)
        steps = torch.stack([standard[_of(group, b)].sort().values for b in range(group.blocks)])
        # a threshold on standardised scores; shifted, so that the sums rise
        sums = (steps.sum(0) + 10 * group.blocks).cumsum(0)[: per - 1]
        return (0.0, *sums.tolist())
    removals = per - min(job.config.min_keep, per)
    problems = _problems(job, group, moments, _dense(job))
    errors = eliminate(problems, group.block_of.tolist(), removals, even=True).errors
    return (0.0, *errors[group.blocks - 1 :: group.blocks])


def _of(group: Group, block: int) -> Tensor:
    return torch.tensor(group.block_of) == block


def _dense(job: _Job) -> Walk:
    return Walk(job.captured.graph_module, [])


def _problems(job: _Job, group: Group, moments: dict[str, Moments], state: Walk) -> list[Problem]:
    """Each consumer for elimination: in the metric of the outputs where there is one, else
    relative to its output.
    """
    problems = []
    for view in job.views[group.name]:
        weight = state.weight(view.parameter).detach()
        matrix = view.matrix(weight).double()
        found = moments[view.node.name]
        second = found.gram.double() / found.tokens
        if job.weighed:
            metric = job.sensed[view.node.name].metric
            matrix = matrix * 0 if metric is None else factor(metric) @ matrix
        else:
            power = torch.einsum("oi,ij,oj->", matrix, second, matrix)
            matrix = matrix / power.clamp_min(1e-300).sqrt()
        damping = max(job.config.ridge, 1e-6) * second.diagonal().mean().clamp_min(1e-12)
        identity = torch.eye(len(second), dtype=second.dtype, device=second.device)
        unit = unit_columns(group, view, weight)
        problems.append(Problem(matrix, second + damping * identity, unit))
    return problems


def _utility(job: _Job, group: Group, moments: dict[str, Moments], state: Walk) -> Tensor:
    """Score per unit [size]: summed over consumers and over the columns of the unit."""
    utility = torch.zeros(group.size, dtype=torch.float64)
    method, together = job.config.passes.score, torch.zeros(())
    for view in job.views[group.name]:
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


def _walk(
    job: _Job,
    groups: list[Group],
    batches: list[Args],
    decided: Decisions,
    progress: Any,
    journal: Journal | None = None,
) -> None:
    """At the first consumer of each group: choose. At every consumer: repair with the inputs of
    the model as pruned so far; go on with the new weight.
    """
    module, towards = job.captured.graph_module, job.config.passes.restore
    pending: dict[Node, list[tuple[Group, View]]] = {}
    for group in groups:
        if job.views[group.name] and batches:
            for view in job.views[group.name]:
                pending.setdefault(view.node, []).append((group, view))
        else:
            utility = _weight_utility(module, group, job.config.passes.score, job.generator)
            keep = decided.budget.keep[group.name]
            decided.kept[group.name] = select(group, utility, keep)
    dense = twin(module, batches) if pending and towards in TOWARDS else None

    def visit(state: Walk, node: Node) -> None:
        moments = {view: state.moments(view) for _, view in pending[node]}
        for group, view in pending[node]:
            if group.name not in decided.kept:
                _choose(job, group, view, moments[view], state, decided)
            _repair(job, group, view, moments[view], state, dense, decided)

    report = (lambda done, total: progress("prune", done, total)) if progress else None
    watched = watch(journal, visit, decided)
    decided.weights = walk(
        module, batches if pending else [], pending, watched, report, _room(job.config)
    )


def _choose(
    job: _Job, group: Group, first: View, here: Moments, state: Walk, decided: Decisions
) -> None:
    """The units that stay. Of several consumers those behind the first have not been run: they
    are judged on the dense model where it was sensed, else by running ahead.
    """
    keep, several = decided.budget.keep[group.name], job.views[group.name]
    if len(several) == 1:
        moments = {several[0].node.name: here}
    elif job.sensed:
        moments = {view.node.name: job.sensed[view.node.name].moments for view in several}
    else:
        moments = probe(state, first.node, several)
        decided.probed += _span(job.captured.graph_module, several)
    if job.config.passes.score != "obs":
        kept = select(group, _utility(job, group, moments, state), keep)
    else:
        removals = group.size // group.blocks - keep
        problems = _problems(job, group, moments, state)
        gone = eliminate(problems, group.block_of.tolist(), removals).order
        worth = dict.fromkeys(range(group.size), len(gone)) | {u: k for k, u in enumerate(gone)}
        stay = [unit for unit in range(group.size) if worth[unit] == len(gone)]
        kept = with_every_piece(group, stay, [float(worth[u]) for u in range(group.size)])
    decided.kept[group.name] = kept


def _span(module: GraphModule, several: list[View]) -> float:
    """The share of the graph's calls from the first to the last consumer."""
    calls = [node for node in module.graph.nodes if node.op == "call_function"]
    at = [calls.index(view.node) for view in several]
    return (max(at) - min(at)) / len(calls)


def _repair(
    job: _Job,
    group: Group,
    view: View,
    found: Moments,
    state: Walk,
    dense: Twin | None,
    decided: Decisions,
) -> None:
    """Refit one consumer. A weight with several uses is fitted to the first: not towards the dense
    path, which differs from use to use.
    """
    several, method = job.views[group.name], job.config.passes.restore
    stays = torch.zeros(group.size + 1, dtype=torch.bool)
    stays[[*decided.kept[group.name], group.size]] = True
    gap = None
    if dense is not None and sum(view.parameter == v.parameter for v in several) == 1:
        gap = drift(state, dense, view, method == "residual")
    weight = state.weight(view.parameter).detach()
    offset = offset_of(view)
    bias = offset.read(state.weight(offset.name).detach()) if offset else None
    mask = stays.to(weight.device)[unit_columns(group, view, weight)]
    result = restore(method, view.matrix(weight), bias, found, mask, job.config.ridge, gap)
    state.weights[view.parameter] = view.weight(result.weight, weight)
    if offset and result.bias is not None:
        state.weights[offset.name] = offset.read(result.bias)
    before, after = decided.errors.get(group.name, (0.0, 0.0))
    decided.errors[group.name] = (
        before + result.error_before / len(several),
        after + result.error_after / len(several),
    )


def _weight_utility(
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
