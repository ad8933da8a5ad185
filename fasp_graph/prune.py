"""prune: the driver. The verbs of passes/ meet here, in order:

capture -> couple -> (observe, score, select, restore at each consumer) -> rewrite -> verify -> emit
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from passes.capture import Args, Captured, as_args, capture
from passes.couple import DependencyGraph, Group, couple, nodes_by_name
from passes.errors import CalibrationError
from passes.labels import Site, propagate
from passes.observe import Moments, View, Walk, probe, walk
from passes.restore import restore
from passes.rewrite import attribute, removal, rewrite
from passes.score import NEEDS_DATA, score
from passes.select import Budget, Plan, allocate, select
from passes.verify import verify

from .config import Config
from .evaluate import flops
from .inputs import refuse_unmergeable
from .layout import equalised, uniform_groups
from .modules import Emission, emit_model
from .report import Frozen, GroupReport, Report

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Pruned:
    """The result: a compact graph, the user's own class made smaller, and how it came about."""

    graph_module: GraphModule
    model: nn.Module
    plan: Plan
    report: Report
    deps: DependencyGraph
    config: Config
    inputs: Args
    dynamic_shapes: Any
    emission: Emission

    def save(self, folder: Any, **options: Any) -> Any:
        """`fasp_graph.save(self, folder)`."""
        from .huggingface import save

        return save(self, folder, **options)

    def export_onnx(self, path: Any) -> Any:
        """`fasp_graph.export_onnx(self, path)`."""
        from .onnx import export_onnx

        return export_onnx(self, path)


def analyze(model: nn.Module, inputs: Any, check: bool = False) -> DependencyGraph:
    """The dependency graph of `model` at example `inputs` (a tensor, a tuple or a dict).
    Weights are not read.
    """
    return _couple(capture(model, inputs), check)


def _couple(captured: Captured, check: bool) -> DependencyGraph:
    labels = propagate(captured.graph_module, captured.inputs, check)
    return couple(labels, dict(captured.graph_module.named_parameters()))


def prune(
    model: nn.Module,
    inputs: Any,
    calibration: Iterable[Any] | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
) -> Pruned:
    """Prune `model`; the model itself is not changed.

    `inputs`: example inputs (a tensor, a tuple or a dict). `calibration`: batches of the same
    form, or None for methods
    that need no data. Raises FaspGraphError: CaptureError, BudgetError, CalibrationError,
    VerificationError...
    """
    config = config or Config()
    seconds: dict[str, float] = {}
    refuse_unmergeable(model)
    with _timed(seconds, "capture"):
        captured = capture(model, inputs)
    with _timed(seconds, "couple"):
        deps = _couple(captured, config.check)
    groups = [g for g in deps.groups if g.kind in config.kinds]
    shared: list[set[str]] = []
    if config.layout == "uniform":
        groups, shared = uniform_groups(model, groups)
    budget = allocate(deps, groups, config.sparsity, config.align, config.min_keep)
    budget = equalised(budget, shared)
    with _timed(seconds, "prune"):
        decisions = _decide(captured, deps, groups, budget, calibration, config, progress)
    plan = Plan(decisions.kept, budget.ratio, budget.sparsity, budget.scope)
    dense = _with_weights(captured.graph_module, decisions.weights)
    cut = removal(deps, plan.kept)
    with _timed(seconds, "rewrite"):
        compact = rewrite(dense, cut)
    with _timed(seconds, "verify"):
        error = verify(dense, compact, cut, captured.inputs, config.seed)
    with _timed(seconds, "emit"):
        small, emission = emit_model(model, compact, deps, plan, captured.inputs)
    report = _report(captured, compact, deps, plan, decisions, emission, seconds, error)
    return Pruned(
        compact,
        small,
        plan,
        report,
        deps,
        config,
        captured.inputs,
        captured.dynamic_shapes,
        emission,
    )


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


@dataclass
class _Decisions:
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)


def _decide(
    captured: Captured,
    deps: DependencyGraph,
    groups: list[Group],
    budget: Budget,
    calibration: Iterable[Any] | None,
    config: Config,
    progress: Progress | None,
) -> _Decisions:
    """Walk the graph; at the first consumer of each group score, select and restore it."""
    module, decided = captured.graph_module, _Decisions()
    nodes = nodes_by_name(module.graph.nodes)
    views = {group.name: _views(group, deps, nodes) for group in groups}
    scoring, repair = config.passes
    needs_data = scoring in NEEDS_DATA or repair != "none"
    if needs_data and calibration is None:
        raise CalibrationError(
            f"score={scoring}, restore={repair} need calibration batches · help: pass "
            f"calibration, or "
            "method='magnitude'"
        )
    generator = torch.Generator().manual_seed(config.seed)
    pending: dict[Node, list[Group]] = {}
    for group in groups:
        if views[group.name] and needs_data:
            pending.setdefault(views[group.name][0].node, []).append(group)
        else:
            utility = _weight_utility(module, group, scoring, generator)
            decided.kept[group.name] = select(group, utility, budget.keep[group.name])

    def visit(state: Walk, node: Node) -> None:
        for group in pending[node]:
            found = views[group.name]
            if len(found) == 1:
                moments = {node.name: state.moments(found[0])}
            else:
                moments = probe(state, node, found)
            _prune_group(
                state, group, found, moments, budget.keep[group.name], config, generator, decided
            )

    batches = _batches(calibration, captured) if pending else []
    decided.weights = walk(
        module,
        batches,
        pending,
        visit,
        (lambda done, total: progress("prune", done, total)) if progress else None,
    )
    return decided


def _batches(calibration: Any, captured: Captured) -> list[Args]:
    if isinstance(calibration, (str, bytes, Tensor)) or not hasattr(calibration, "__iter__"):
        raise CalibrationError(
            f"calibration is {type(calibration).__name__}, not an iterable of batches · help: "
            f"give a list of inputs"
        )
    batches = [as_args(batch) for batch in calibration]
    if not batches:
        raise CalibrationError("calibration is empty · help: give at least one batch of inputs")
    return batches


def _views(group: Group, deps: DependencyGraph, nodes: dict[str, Node]) -> list[View]:
    """The group's consumers as matrices; empty if one of them is not a plain linear or
    convolution.
    """
    found = []
    for consumer in group.consumers:
        node = nodes[consumer.node]
        site = _site(deps, consumer.node, consumer.parameter)
        plain = not _grouped(node) and "transpose" not in str(node.target)
        if not consumer.parameter or site is None or not plain:
            return []
        source = next(o for o in site.operands if o.data)
        found.append(
            View(node, consumer.parameter, consumer.dim, nodes[source.node.name], source.dim)
        )
    return found


def _grouped(node: Node) -> bool:
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = schema.index("groups") if "groups" in schema else -1
    return at >= 0 and len(node.args) > at and node.args[at] != 1


def _site(deps: DependencyGraph, node: str, parameter: str) -> Site | None:
    for site in deps.labels.sites:
        if site.node.name == node and len(site.operands) == 2:
            names = [str(o.node.target) for o in site.operands if o.node.op == "get_attr"]
            if names == [parameter]:
                return site
    return None


def _columns(group: Group, view: View, weight: Tensor) -> Tensor:
    """[columns of the view's matrix] -> unit, -1 where the column is not the group's."""
    kernel = weight[0, 0].numel() if view.convolution else 1
    unit = torch.full((weight.shape[view.dim],), -1)
    for member in group.members:
        if (member.parameter, member.dim) == (view.parameter, view.dim):
            for number, indices in enumerate(member.indices):
                unit[list(indices)] = number
    return unit.repeat_interleave(kernel).to(weight.device)


def _prune_group(
    state: Walk,
    group: Group,
    views: list[View],
    moments: dict[str, Moments],
    keep: int,
    config: Config,
    generator: torch.Generator,
    decided: _Decisions,
) -> None:
    scoring, repair = config.passes
    utility = torch.zeros(group.size, dtype=torch.float64)
    for view in views:
        weight = state.weight(view.parameter).detach()
        unit = _columns(group, view, weight)
        columns = score(scoring, view.matrix(weight), moments[view.node.name], generator)
        mine = unit >= 0
        utility.index_add_(0, unit[mine].cpu(), columns[mine].cpu())
    kept = select(group, utility, keep)
    decided.kept[group.name] = kept
    stays = torch.zeros(group.size + 1, dtype=torch.bool)
    stays[[*kept, group.size]] = True
    before, after = 0.0, 0.0
    for view in views:
        weight = state.weight(view.parameter).detach()
        name = _bias_name(view)
        bias = state.weight(name).detach() if name else None
        mask = stays.to(weight.device)[_columns(group, view, weight)]
        result = restore(
            repair, view.matrix(weight), bias, moments[view.node.name], mask, config.ridge
        )
        state.weights[view.parameter] = view.weight(result.weight, weight)
        if name and result.bias is not None:
            state.weights[name] = result.bias
        before, after = before + result.error_before, after + result.error_after
    decided.errors[group.name] = (before / len(views), after / len(views))


def _bias_name(view: View) -> str:
    """The parameter that the consumer adds, '' if none."""
    schema = [a.name for a in view.node.target._schema.arguments]  # type: ignore[union-attr]
    bound = dict(zip(schema, view.node.args, strict=False)) | dict(view.node.kwargs)
    bias = bound.get("self" if "addmm" in str(view.node.target) else "bias")
    return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else ""


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
        total += torch.stack([squares[list(indices)].sum() for indices in member.indices]).cpu()
    return total.sqrt()


def _with_weights(module: GraphModule, weights: dict[str, Tensor]) -> GraphModule:
    dense = copy.deepcopy(module)
    with torch.no_grad():
        for name, weight in weights.items():
            attribute(dense, name).copy_(weight)
    return dense


def _report(
    captured: Captured,
    compact: GraphModule,
    deps: DependencyGraph,
    plan: Plan,
    decisions: _Decisions,
    emission: Emission,
    seconds: dict[str, float],
    error: float,
) -> Report:
    unknown = (float("nan"), float("nan"))
    pruned = tuple(
        GroupReport(
            g.name,
            g.kind,
            g.size,
            len(plan.kept[g.name]),
            *decisions.errors.get(g.name, unknown),
            emission.ways[g.name],
        )
        for g in deps.groups
        if g.name in plan.kept
    )
    left = tuple(
        Frozen(g.name, g.kind, g.reason or "not asked for")
        for g in deps.groups
        if g.name not in plan.kept
    )
    dense = captured.graph_module
    before, after = list(dense.parameters()), list(compact.parameters())
    return Report(
        sum(p.numel() for p in before),
        sum(p.numel() for p in after),
        sum(p.nbytes for p in before),
        sum(p.nbytes for p in after),
        flops(dense, *captured.inputs),
        flops(compact, *captured.inputs),
        plan.sparsity,
        seconds,
        pruned,
        error,
        left,
    )
