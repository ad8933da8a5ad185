"""A dry run: the plan and its sizes, and how long the pruning would take, without pruning.

    expected seconds = what was spent here (capture, couple) + deciding + as much again to verify,
                       rewrite and emit as the first two took
    deciding         = one forward pass over all calibration batches
                       * (passes that the method costs, fasp_graph/decide.py
                          + FLOPs of the Gram matrices / FLOPs of the forward pass)

A Gram matrix of a consumer with n columns costs 2 n^2 FLOPs a token, its own product 2 n m.

Counts are those of uniform allocation. Where the method spreads the sparsity by the calibration
data (`exact` is false), a run removes about as much in all, and other numbers of each group.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape

from passes.capture import as_args
from passes.consumers import views
from passes.cost import parameter_cost
from passes.groups import DependencyGraph, Group
from passes.names import folded, pattern
from passes.removal import nodes_by_name
from passes.select import Plan

from ..calibration import affordable, batches_of, measuring, needs_data, sensing
from ..config import Config
from ..decide import _cost, even
from ..emit.layout import Said, uniform_groups
from ..jsontext import to_json
from ..pages.view import shapes_after
from ..pricing import measured_cost
from ..prune import Program, read
from ..targets import Target
from ..units import counted
from ..worth import Job
from .cells import figures_table
from .terminal import wide_console


@dataclass(frozen=True)
class DryRun:
    """Sizes in parameters; `keep`: group -> units that each of its blocks keeps; `exact`: whether
    a run keeps as many of each group.
    """

    params_before: int
    params_after: int
    sparsity: float
    keep: dict[str, int]
    sizes: dict[str, int]
    frozen: dict[str, str]
    forward_passes: float
    expected_seconds: float
    exact: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**vars(self), "removed": self.removed}

    @property
    def removed(self) -> float:
        """The removed share of all parameters; `sparsity` is that of those in scope."""
        return 1 - self.params_after / self.params_before


def dry_run(target: Target, config: Config) -> DryRun:
    """Analyse `target` and allocate its budget; BudgetError as in `prune`."""
    started = time.perf_counter()
    program = read(target.model, target.inputs, config.check)
    deps = program.deps
    analysed = time.perf_counter() - started
    groups = [group for group in deps.groups if group.kind in config.kinds]
    shared: list[Said] = []
    if config.layout == "uniform":
        groups, shared = uniform_groups(target.model, groups)
    counted_in = cost = parameter_cost(deps, groups)
    if groups and measuring(config):
        data = target.calibration if needs_data(config) else None
        batches = batches_of(data, program.captured.inputs, config) if data else []
        counted_in = measured_cost(program.captured, deps, groups, batches, config)
    budget = even(deps, groups, shared, config, counted_in)
    blocks = {group.name: group.blocks for group in groups}
    kept = {name: range(count * blocks[name]) for name, count in budget.keep.items()}
    plan = Plan(
        {name: tuple(units) for name, units in kept.items()},
        budget.ratio,
        cost.removed(budget.keep),
        budget.scope,
    )
    before = {name: _numel(shape) for name, shape in deps.parameters.items()}
    after = {name: _numel(shape) for name, shape in shapes_after(deps, plan).items()}
    passes = _passes(program, groups, target, config)
    return DryRun(
        sum(before.values()),
        sum({**before, **after}.values()),
        plan.sparsity,
        budget.keep,
        {group.name: group.size // group.blocks for group in groups},
        {group.name: group.reason for group in deps.groups if group.kind == "frozen"},
        passes,
        round(2 * analysed + _deciding(target, passes, _gram_share(deps, set(plan.kept))), 2),
        config.passes.allocation == "uniform" and not measuring(config),
    )


def _passes(program: Program, groups: list[Group], target: Target, config: Config) -> float:
    """What deciding will cost, in forward passes over the calibration batches."""
    if not target.calibration or not needs_data(config):
        return 0.0
    captured = program.captured
    given = batches_of(target.calibration, captured.inputs, config)
    batches, config = affordable(captured, given, config)
    nodes = nodes_by_name(captured.graph_module.graph.nodes)
    found = {group.name: views(group, program.deps, nodes) for group in groups}
    sensed: Any = dict.fromkeys(found) if sensing(config) else {}
    job = Job(captured, program.deps, {}, config, found, {}, sensed, torch.Generator())
    return _cost(job, len(batches), len(given))


def _deciding(target: Target, passes: float, gram: float) -> float:
    """Seconds, from those of one forward pass over the first batch."""
    if not passes:
        return 0.0
    args, kwargs = as_args(target.calibration[0])
    started = time.perf_counter()
    with torch.no_grad():
        target.model(*args, **kwargs)
    return (time.perf_counter() - started) * len(target.calibration) * (passes + gram)


def _gram_share(deps: DependencyGraph, pruned: set[str]) -> float:
    """FLOPs of the Gram matrices of the pruned groups' consumers per FLOP of all weights."""
    gram = 0
    for group in deps.groups:
        for consumer in group.consumers if group.name in pruned else ():
            shape = deps.parameters.get(consumer.parameter, ())
            gram += shape[consumer.dim] ** 2 if len(shape) > 1 else 0
    return gram / max(1, sum(_numel(shape) for shape in deps.parameters.values()))


def _numel(shape: Any) -> int:
    return int(torch.Size(shape).numel())


def show_dry_run(target: Target, options: Config, json: bool) -> None:
    """A dry run as a table, or as JSON."""
    found = dry_run(target, options)
    if json:
        print(to_json(found.to_dict(), indent=1))
        return
    heads = ("group", "units per block", "keeps")
    result = figures_table(*heads, title="Plan, nothing pruned")
    alike: dict[tuple[str, int, int], list[str]] = {}
    for name, count in found.keep.items():
        alike.setdefault((pattern(name), found.sizes[name], count), []).append(name)
    for (_, size, count), names in alike.items():
        result.add_row(escape("\n".join(folded(names))), str(size), str(count))
    wide_console().print(result)
    frozen = counted(len(found.frozen), "group")
    wide_console().print(
        f"parameters {found.params_before:,} -> {found.params_after:,}, {found.removed:.1%} of all "
        f"and {found.sparsity:.1%} of those in scope; {frozen} frozen; "
        f"about {found.expected_seconds:.0f} s"
    )
    if measuring(options):
        wide_console().print(
            "The time of the layers was measured for these counts; a run measures it anew, and may "
            "keep others."
        )
    if options.passes.allocation != "uniform":
        wide_console().print(
            f"The counts are those of uniform allocation. method={options.method} spreads the "
            f"sparsity over the groups by the calibration data (allocation="
            f"{options.passes.allocation}), so a run keeps other numbers of each group, and about "
            "as many parameters; with --allocation uniform it keeps these."
        )
