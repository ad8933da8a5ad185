"""decide: which units of each group go, and the weights of what stays.

    sense (dense statistics, metric) -> eliminate (error curves) -> allocate -> walk:
        at each consumer observe, score or eliminate, select, restore

With allocation=uniform the first three are skipped: the walk alone is one forward pass.
Cost in plain forward passes over the calibration batches, a backward pass counting as two:

    walk 1, the dense path beside it 1 (restore asymmetric, residual; outputs, where a group has
        several consumers),
    sense: 1/2 of the batches (1/4 with restore outputs) x 3 (allocation sensitivity, score taylor)
        or x 1 (the others)
    budget latency: one of the batches x 1
    restore outputs: up to three steps on 1/8 of the batches x 3 or 4 (fasp_graph/correction.py)

Few batches are cut along their rows; where they cannot be, method="best" repairs with `residual`
or `affine`, so that no default costs more than 4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from passes.allocate import allocate_by_error, leans
from passes.capture import Args, Captured
from passes.consumers import views
from passes.cost import Cost, parameter_cost
from passes.couple import DependencyGraph, Group
from passes.errors import NoGradient
from passes.experts import expert_view, independent
from passes.gates import gated
from passes.removal import nodes_by_name
from passes.rotate import rotatable
from passes.score import ROTATING
from passes.select import Budget, allocate
from passes.sensitivity import Sensed, sense
from passes.views import View

from .calibration import (
    affordable,
    backward,
    batches_of,
    measuring,
    needs_data,
    sensing,
    without_gradients,
)
from .config import Config
from .correction import beside, correction_cost, sensed_on
from .emit.layout import Said, settled
from .pricing import measured_cost
from .scale.distributed import refuse_idle, room, share
from .scale.journal import fingerprint, open_journal
from .scale.microbatch import microbatches
from .walking import Decisions, settle_all
from .worth import Job, Progress, cosines_of, curves_of


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
    cost = parameter_cost(deps, groups)
    measured = bool(groups) and measuring(config)
    budget = None if measured else even(deps, groups, shared, config, cost)
    every = batches_of(calibration, captured.inputs, config) if needs_data(config) else []
    module = captured.graph_module
    journal = open_journal(work, fingerprint(module, every, config), module) if work else None
    if budget is None:
        cost = measured_cost(captured, deps, groups, every, config, journal)
        budget = even(deps, groups, shared, config, cost)
    module, gates = gated(module, groups, deps)
    captured = replace(captured, graph_module=module)
    nodes = nodes_by_name(module.graph.nodes)
    found = {group.name: views(group, deps, nodes) for group in groups}
    batches, config = affordable(captured, every, config)
    batches = microbatches(captured, batches, config.max_memory)
    if batches:
        refuse_idle(batches)
    alone = [group for group in groups if not found[group.name]]
    sensed, config, notes = _sense(captured, found, batches, config)
    own = independent(captured.graph_module, alone, deps, captured.inputs, config.seed)
    job = Job(
        captured,
        deps,
        gates,
        config,
        found,
        {group.name: expert_view(group, deps, nodes) for group in own},
        sensed,
        torch.Generator().manual_seed(config.seed),
        _rotatable(captured, groups, found, config),
    )
    decided = Decisions(budget, cost, notes=notes + _deaf(job))
    if config.passes.allocation not in ("uniform", "influence"):
        decided.curves = curves_of(job, groups, progress)
    spread = _spread(job, deps, groups, decided)
    decided.budget = settled(deps, groups, spread, shared, config, cost)
    settle_all(job, groups, batches, decided, progress, journal)
    decided.forward_passes = _cost(job, len(batches), len(every))
    return decided


def _rotatable(
    captured: Captured, groups: list[Group], found: dict[str, list[View]], config: Config
) -> frozenset[str]:
    """Groups that may turn, but those that share a consumer: the repair of the other one there
    must leave their columns at zero, which it knows of channels alone.
    """
    if config.passes.score not in ROTATING:
        return frozenset()
    weights = {group.name: {view.parameter for view in found[group.name]} for group in groups}
    uses = Counter(name for several in weights.values() for name in several)
    plain = [g for g in groups if weights[g.name] and all(uses[n] == 1 for n in weights[g.name])]
    return rotatable(captured.graph_module, plain, captured.inputs, config.seed)


def even(
    deps: DependencyGraph, groups: list[Group], shared: list[Said], config: Config, cost: Cost
) -> Budget:
    """One ratio for all groups."""
    limits = (config.sparsity, config.align, config.min_keep)
    return settled(deps, groups, allocate(deps, groups, *limits, cost=cost), shared, config, cost)


def _spread(job: Job, deps: DependencyGraph, groups: list[Group], decided: Decisions) -> Budget:
    """The uniform budget, spread over the groups as the allocation wants it."""
    config, uniform = job.config, decided.budget
    limits = (config.sparsity, config.align, config.min_keep)
    if config.passes.allocation == "influence":
        lean = leans(cosines_of(job, groups))
        return allocate(deps, groups, *limits, lean=lean, cost=decided.cost)
    if not decided.curves:
        return uniform
    per_unit = config.passes.allocation == "standardised"
    return allocate_by_error(
        deps, groups, uniform, decided.curves, *limits, per_unit=per_unit, cost=decided.cost
    )


def _sense(
    captured: Captured, found: dict[str, list[View]], batches: list[Args], config: Config
) -> tuple[dict[str, Sensed], Config, tuple[str, ...]]:
    """Dense statistics on a share of the batches, where they are needed; the options that go with
    them, since not every model has gradients, and what to say of that.
    """
    if not sensing(config):
        return {}, config, ()
    sites = [view for several in found.values() for view in several]
    chosen = share([batches[number] for number in sensed_on(len(batches), config)])
    module = captured.graph_module
    try:
        sensed = sense(module, chosen, sites, config.seed, backward(config), room())
    except NoGradient as error:
        again = _sense(captured, found, batches, without_gradients(config, error))
        return again[0], again[1], (f"{error}; as is done here",)
    return sensed, config, ()


def _deaf(job: Job) -> tuple[str, ...]:
    """A note where the metric of the outputs was asked for, and does not reach all consumers."""
    names = job.unreached if backward(job.config) else []
    if not names:
        return ()
    several = f" and {len(names) - 1} more" if len(names) > 1 else ""
    note = f"no gradient of the outputs reaches {names[0]}{several}: errors are relative to each "
    return (note + "layer's own output",)


def _cost(job: Job, batches: int, given: int) -> float:
    """`batches`: those that are walked; `given`: as the user cut them, of which a budget in time
    runs one.
    """
    config = job.config
    if not batches:
        return 0.0
    share = len(sensed_on(batches, config)) / batches if sensing(config) else 0.0
    dense = beside(config, job.views)
    after = correction_cost(batches, dense) if config.passes.restore == "outputs" else 0.0
    timing = 1 / given if measuring(config) else 0.0
    return 1.0 + dense + share * (3 if backward(config) else 1) + after + timing + _ahead(job)


def _ahead(job: Job) -> float:
    """Running ahead: for groups of several consumers the share of the calls between the first and
    the last, where the dense model was not sensed.
    """
    calls = [n for n in job.captured.graph_module.graph.nodes if n.op == "call_function"]
    place = {node: number for number, node in enumerate(calls)}
    spans = [[place[view.node] for view in several] for several in job.views.values() if several]
    return 0.0 if job.sensed else sum(max(at) - min(at) for at in spans) / len(calls)
