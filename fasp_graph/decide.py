"""decide: which units of each group go, and the weights of what stays.

    sense (dense statistics, metric) -> eliminate (error curves) -> allocate -> walk:
        at each consumer observe, score or eliminate, select, restore

With allocation=uniform the first three are skipped: the walk alone is one forward pass.
Cost in plain forward passes over the calibration batches, a backward pass counting as two:

    walk 1, the dense path beside it 1 (restore asymmetric, residual, outputs),
    sense: 1/2 of the batches (1/4 with restore outputs) x 3 (allocation sensitivity, score taylor)
        or x 1 (the others)
    restore outputs: 1/4 of the batches x 3, 1/8 x 4 (fasp_graph/correction.py)

Few batches are cut along their rows; where they cannot be, method="best" repairs with `residual`
or `affine`, so that no default costs more than 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.allocate import allocate_by_error, leans
from passes.capture import Args, Captured
from passes.consumers import offset_of, staying, unit_columns, views
from passes.couple import DependencyGraph, Group
from passes.drift import Twin, drift, twin
from passes.eliminate import eliminate
from passes.experts import ExpertView, Orders, expert_view, independent, moved
from passes.gates import behind, gated, level
from passes.observe import Moments, Room, Walk, probe, walk
from passes.pieces import with_every_piece
from passes.removal import nodes_by_name
from passes.restore import TOWARDS, restore
from passes.rewrite import attribute
from passes.select import Budget, allocate, select
from passes.sensitivity import Sensed, sense
from passes.views import View

from .calibration import (
    affordable,
    backward,
    batches_of,
    needs_data,
    sensing,
    shared_batches,
    solving,
)
from .config import Config
from .correction import corrected, correction_cost, sensed_on
from .emit.layout import Said, settled
from .experts import settle_experts, weight_orders
from .scale.distributed import total
from .scale.journal import Journal, fingerprint, open_journal, watch
from .scale.microbatch import microbatches
from .scale.spill import Spill
from .worth import Job, Progress, cosines_of, curves_of, problems_of, utility_of, weight_utility


@dataclass
class Decisions:
    """Filled group by group. `curves[name][k]`: error of removing k units per block;
    `seen`: tokens and channels at each consumer's weight that is solved for; `orders`: groups of
    which each expert keeps its own units, put in front (passes/experts.py); `forward_passes`: the
    cost, in plain forward passes over the calibration batches.
    """

    budget: Budget
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)
    forward_passes: float = 0.0


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
    module, gates = gated(captured.graph_module, groups, deps)
    captured = replace(captured, graph_module=module)
    nodes = nodes_by_name(module.graph.nodes)
    found = {group.name: views(group, deps, nodes) for group in groups}
    every = batches_of(calibration, captured.inputs, config) if needs_data(config) else []
    key = fingerprint(captured.graph_module, every, config) if work else ""
    batches, config = affordable(captured, shared_batches(every, config) if every else [], config)
    batches = microbatches(captured, batches, config.max_memory)
    alone = [group for group in groups if not found[group.name]]
    own = independent(captured.graph_module, alone, deps, captured.inputs, config.seed)
    job = Job(
        captured,
        deps,
        gates,
        config,
        found,
        {group.name: expert_view(group, deps, nodes) for group in own},
        _sense(captured, found, batches, config),
        torch.Generator().manual_seed(config.seed),
    )
    decided = Decisions(budget)
    if config.passes.allocation not in ("uniform", "influence"):
        decided.curves = curves_of(job, groups, progress)
    spread = _spread(job, deps, groups, decided)
    decided.budget = settled(deps, groups, spread, shared, config)
    journal = open_journal(work, key, captured.graph_module) if work else None
    _walk(job, groups, batches, decided, progress, journal)
    decided.forward_passes = _cost(job, len(batches))
    return decided


def _spread(job: Job, deps: DependencyGraph, groups: list[Group], decided: Decisions) -> Budget:
    """The uniform budget, spread over the groups as the allocation wants it."""
    config, uniform = job.config, decided.budget
    limits = (config.sparsity, config.align, config.min_keep)
    if config.passes.allocation == "influence":
        return allocate(deps, groups, *limits, lean=leans(cosines_of(job, groups)))
    if not decided.curves:
        return uniform
    per_unit = config.passes.allocation == "standardised"
    return allocate_by_error(deps, groups, uniform, decided.curves, *limits, per_unit=per_unit)


def _room(config: Config) -> Room:
    settle = None if config.max_memory is None else Spill(config.max_memory)
    return Room(total, settle)


def _sense(
    captured: Captured, found: dict[str, list[View]], batches: list[Args], config: Config
) -> dict[str, Sensed]:
    """Dense statistics on a share of the batches, where they are needed."""
    if not sensing(config):
        return {}
    sites = [view for several in found.values() for view in several]
    chosen = [batches[number] for number in sensed_on(len(batches), config)]
    return sense(captured.graph_module, chosen, sites, config.seed, backward(config))


def _cost(job: Job, batches: int) -> float:
    config = job.config
    if not batches:
        return 0.0
    share = len(sensed_on(batches, config)) / batches if sensing(config) else 0.0
    dense = 1.0 * (config.passes.restore in TOWARDS)
    after = correction_cost(batches) if config.passes.restore == "outputs" else 0.0
    return 1.0 + dense + share * (3 if backward(config) else 1) + after + _ahead(job)


def _ahead(job: Job) -> float:
    """Running ahead: for groups of several consumers the share of the calls between the first and
    the last, where the dense model was not sensed.
    """
    calls = [n for n in job.captured.graph_module.graph.nodes if n.op == "call_function"]
    place = {node: number for number, node in enumerate(calls)}
    spans = [[place[view.node] for view in several] for several in job.views.values() if several]
    return 0.0 if job.sensed else sum(max(at) - min(at) for at in spans) / len(calls)


def _walk(
    job: Job,
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
    shut: dict[str, Tensor] = {}
    pending: dict[Node, list[tuple[Group, View]]] = {}
    routed: dict[Node, list[tuple[Group, ExpertView]]] = {}
    for group in groups:
        keep, inside = decided.budget.keep[group.name], job.experts.get(group.name)
        if group.name in job.experts:
            decided.kept[group.name] = tuple(range(keep))
        if job.views[group.name] and batches:
            for view in job.views[group.name]:
                pending.setdefault(view.node, []).append((group, view))
        elif inside is not None and batches:
            routed.setdefault(inside.node, []).append((group, inside))
        elif group.name in job.experts:
            decided.orders[group.name] = weight_orders(job, group, keep)
        else:
            utility = weight_utility(module, group, job.config.passes.score, job.generator)
            decided.kept[group.name] = select(group, utility, keep)
            shut |= _shut(job, group, decided, shut)
    dense = twin(module, batches) if pending and towards in TOWARDS else None

    def visit(state: Walk, node: Node) -> None:
        for group, inside in routed.get(node, ()):
            found = settle_experts(job, group, inside, state, len(decided.kept[group.name]))
            decided.orders[group.name], decided.errors[group.name] = found.orders, found.errors
            if solving(job.config):
                decided.seen[inside.parameter] = found.seen
        moments = {view: state.moments(view) for _, view in pending.get(node, ())}
        chosen = [each for each in pending.get(node, ()) if each[0].name not in decided.kept]
        for group, view in chosen:
            _choose(job, group, view, moments[view], state, decided)
        for group, view in pending.get(node, ()):
            _repair(job, group, view, moments[view], state, dense, decided)
        gone = [(group, view) for group, view in chosen if group.name in job.gates]
        for group, _ in gone:
            state.weights |= _shut(job, group, decided, state.weights)
        for earlier in again[node] if gone else ():
            state.step(earlier)
        for view in {view: None for _, view in gone}:
            level(view, moments[view], state)

    report = (lambda done, total: progress("prune", done, total)) if progress else None
    watched = watch(journal, visit, decided)
    stops = {*pending, *routed}
    again = {node: [pick for _, v in held for pick in v.picks] for node, held in routed.items()}
    for node, several in pending.items():
        first = [group for group, view in several if view is job.views[group.name][0]]
        gates = [gate for group in first for gate in job.gates.get(group.name, ())]
        again[node] = [*again.get(node, ()), *behind(module, gates, node)]
    decided.weights = walk(
        module, batches if stops else [], stops, watched, report, _room(job.config), again, shut
    )
    if dense is not None and towards == "outputs":
        decided.weights = corrected(
            module, groups, job.views, decided.kept, decided.weights, batches, dense
        )
    for gate in (gate for several in job.gates.values() for gate in several):
        decided.weights.pop(gate.name, None)
    _put_in_order(job, groups, decided)


def _shut(
    job: Job, group: Group, decided: Decisions, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The group's gates without what it removes."""
    kept, found = decided.kept[group.name], {}
    for gate in job.gates.get(group.name, ()):
        now = weights.get(gate.name, attribute(job.captured.graph_module, gate.name))
        found[gate.name] = now & gate.closed(job.deps, group, kept).to(now.device)
    return found


def _put_in_order(job: Job, groups: list[Group], decided: Decisions) -> None:
    """What each expert keeps goes in front, so that all of them keep the same positions."""
    state = Walk(job.captured.graph_module, [], decided.weights)
    for name, move in moved(groups, decided.orders).items():
        decided.weights[name] = move(state.held(name).detach())


def _choose(
    job: Job, group: Group, first: View, here: Moments, state: Walk, decided: Decisions
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
    if job.config.passes.score != "obs":
        kept = select(group, utility_of(job, group, moments, state), keep)
    else:
        removals = group.size // group.blocks - keep
        problems = problems_of(job, group, moments, state)
        gone = eliminate(problems, group.block_of.tolist(), removals).order
        worth = dict.fromkeys(range(group.size), len(gone)) | {u: k for k, u in enumerate(gone)}
        stay = [unit for unit in range(group.size) if worth[unit] == len(gone)]
        kept = with_every_piece(group, stay, [float(worth[u]) for u in range(group.size)])
    decided.kept[group.name] = kept


def _repair(
    job: Job,
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
    gap = None
    if dense is not None and sum(view.parameter == v.parameter for v in several) == 1:
        gap = drift(state, dense, view, method != "asymmetric")
    weight = state.weight(view.parameter).detach()
    offset = offset_of(view)
    bias = offset.read(state.weight(offset.name).detach()) if offset else None
    mask = staying(group, decided.kept[group.name], unit_columns(group, view, weight))
    if solving(job.config):
        decided.seen.setdefault(view.parameter, (found.tokens, len(found.gram)))
    result = restore(method, view.matrix(weight), bias, found, mask, job.config.ridge, gap)
    state.weights[view.parameter] = view.weight(result.weight, weight)
    if offset and result.bias is not None:
        state.weights[offset.name] = offset.read(result.bias)
    before, after = decided.errors.get(group.name, (0.0, 0.0))
    decided.errors[group.name] = (
        before + result.error_before / len(several),
        after + result.error_after / len(several),
    )
