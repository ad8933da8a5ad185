"""prune: the driver. The verbs of passes/ meet here, in order:

capture -> couple -> decide (observe, score, select, restore) -> rewrite -> verify -> emit
"""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.analysis import analysis
from passes.capture import Args, Captured, capture
from passes.cost import scope
from passes.couple import DependencyGraph
from passes.errors import UnsupportedOp
from passes.kernels import widen
from passes.lazy import is_lazy, replace
from passes.rehearsal import frozen, refusals, rehearsed
from passes.removal import removal
from passes.rewrite import attribute, rewrite
from passes.select import Plan
from passes.state import steady
from passes.verify import verify

from .calibration import needs_data, refuse_dataless
from .config import Config
from .decide import Progress, decide
from .emit.layout import Said, uniform_groups
from .emit.modules import Emission, emit_model
from .emit.standin import stand_in
from .evaluate import flops, shapes_of
from .folders.origin import Pruning, remember
from .folders.settings import told_plain
from .inputs import refuse_modelless, refuse_unmergeable, refuse_unstreamable
from .memory import peak_cuda, peak_host, restart
from .notes import notes
from .pricing import layer_seconds
from .report import Frozen, GroupReport, Report
from .units import counted
from .walking import Decisions


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

    def __repr__(self) -> str:
        """One line; the report has the rest."""
        report = self.report
        return (
            f"Pruned({type(self.model).__name__}: {counted(len(report.groups), 'group')} pruned, "
            f"parameters {report.params_before:,} -> {report.params_after:,}, "
            f"{report.sparsity:.1%} of those in scope removed)"
        )

    def save(self, folder: Any, **options: Any) -> Any:
        """`fasp_graph.save(self, folder)`."""
        from .folders.huggingface import save

        return save(self, folder, **options)

    def export_onnx(self, path: Any) -> Any:
        """`fasp_graph.export_onnx(self, path)`."""
        from .exports.onnx import export_onnx

        return export_onnx(self, path)


def analyze(model: nn.Module, inputs: Any, check: bool = False) -> DependencyGraph:
    """The dependency graph of `model` at example `inputs` (a tensor, a tuple or a dict).
    Weights are not read.
    """
    return read(model, inputs, check).deps


@dataclass(frozen=True)
class Program:
    """A model as it was read: captured, its groups, and the seconds of each."""

    captured: Captured
    deps: DependencyGraph
    seconds: dict[str, float]


def read(
    model: nn.Module, inputs: Any, check: bool = False, progress: Progress | None = None
) -> Program:
    """Capture and analyse; what comes back can be pruned several times."""
    seconds: dict[str, float] = {}
    with _stage("capture", seconds, progress):
        captured = capture(model, inputs)
    with _stage("couple", seconds, progress):
        deps = analysis(captured.graph_module, captured.inputs, check)
        deps = rehearsed(captured.graph_module, captured.inputs, deps)
    return Program(captured, deps, seconds)


def prune(
    model: nn.Module,
    inputs: Any,
    calibration: Iterable[Any] | None = None,
    config: Config | None = None,
    progress: Progress | None = None,
    program: Program | None = None,
    work: str | os.PathLike[str] | None = None,
) -> Pruned:
    """Prune `model`; the model itself is not changed.

    Args:
        model: any module.
        inputs: example inputs (a tensor, a tuple or a dict).
        calibration: batches of the same form, or None for methods that need no data.
        config: the options.
        progress: progress(stage, done, total) is called as the work goes on; total is 0 where it
            is not known.
        program: what `read` made of this model and these inputs, where it is pruned several times.
        work: a folder for what is finished; the same call goes on from there after an
            interruption (fasp_graph/scale/journal.py).

    Raises:
        FaspGraphError: CaptureError, BudgetError, CalibrationError, VerificationError...
    """
    config = config or Config()
    refuse_modelless(model)
    refuse_unmergeable(model)
    refuse_unstreamable(is_lazy(model), config)
    refuse_dataless(calibration, config)
    restart()
    program = program or read(model, inputs, config.check, progress)
    captured, seconds = program.captured, dict(program.seconds)
    with _stage("prune", seconds, progress):
        folder = None if work is None else Path(work)
        with steady(captured.graph_module):
            deps, decisions = _decided(model, program, calibration, config, progress, folder)
    dense = _with_weights(captured.graph_module, decisions.weights)
    cut = removal(deps, decisions.kept)
    with _stage("rewrite", seconds, progress):
        compact = widen(rewrite(dense, cut), captured.inputs)
    plan = _plan(deps, decisions, compact)
    with _stage("verify", seconds, progress):
        error = verify(dense, compact, cut, captured.inputs, config.seed)
    with _stage("emit", seconds, progress):
        numbers = functools.partial(stand_in, model, captured, cut) if is_lazy(model) else None
        small, emission = emit_model(model, compact, deps, plan, captured.inputs, numbers)
    decisions.notes = notes(captured, plan, decisions, config)
    report = _report(captured, compact, deps, plan, decisions, emission, seconds, error, config)
    made = told_plain(
        small, Pruning(plan, report, config, emission, captured.inputs, deps.parameters)
    )
    sizes = captured.dynamic_shapes
    given = (plan, made.report, deps, config, captured.inputs, sizes, emission)
    return Pruned(compact, remember(small, made), *given)


def _decided(
    model: nn.Module,
    program: Program,
    calibration: Iterable[Any] | None,
    config: Config,
    progress: Progress | None,
    folder: Path | None,
) -> tuple[DependencyGraph, Decisions]:
    """Decide. Where the rewriter refuses what was chosen of a group, that group is frozen, and the
    others are decided anew.
    """
    captured, deps = program.captured, program.deps
    if isinstance(calibration, Iterator) and needs_data(config):
        calibration = list(calibration)
    found: dict[str, str] = {}
    while True:
        groups = [g for g in deps.groups if g.kind in config.kinds]
        if found and not groups:
            name, reason = next(iter(found.items()))
            raise UnsupportedOp(f"group {name}: {reason}")
        shared: list[Said] = []
        if config.layout == "uniform":
            groups, shared = uniform_groups(model, groups)
        decisions = decide(captured, deps, groups, calibration, config, progress, shared, folder)
        found = refusals(captured.graph_module, captured.inputs, deps, decisions.kept)
        if not found:
            return deps, decisions
        deps, folder = frozen(deps, found), None  # a journal is of one choice of groups


def _plan(deps: DependencyGraph, decisions: Decisions, compact: GraphModule) -> Plan:
    """The plan with the sparsity that was reached, counted on the compact graph."""
    budget, names = decisions.budget, scope(deps)
    left = sum(p.numel() for name, p in compact.named_parameters() if name in names)
    experts = {
        name: [order[: len(decisions.kept[name])] for order in orders]
        for name, orders in decisions.orders.items()
    }
    return Plan(decisions.kept, budget.ratio, 1 - left / budget.scope, budget.scope, experts)


@contextmanager
def _stage(stage: str, seconds: dict[str, float], progress: Progress | None) -> Iterator[None]:
    """Say what begins, and keep how long it took."""
    if progress:
        progress(stage, 0, 0)
    started = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - started


def _with_weights(module: GraphModule, weights: dict[str, Tensor]) -> GraphModule:
    dense = copy.deepcopy(module)
    new = {id(attribute(dense, name)): weight for name, weight in weights.items()}
    replace(dense, lambda _, held: new.get(id(held)))
    with torch.no_grad():
        for name, buffer in dense.named_buffers():
            if name in weights:
                buffer.copy_(weights[name])
    return dense


def _group_reports(
    deps: DependencyGraph, plan: Plan, decisions: Decisions, emission: Emission
) -> tuple[GroupReport, ...]:
    unknown = (float("nan"), float("nan"))
    return tuple(
        GroupReport(
            g.name,
            g.kind,
            g.size,
            len(plan.kept[g.name]),
            *decisions.errors.get(g.name, unknown),
            emission.ways[g.name],
            decisions.curves.get(g.name, ()),
            *decisions.scores.get(g.name, unknown),
            g.blocks,
            g.name in decisions.rotated,
        )
        for g in deps.groups
        if g.name in plan.kept
    )


def _why_left(kind: str, config: Config) -> str:
    """Why a group that can be pruned was not."""
    if config.layout == "uniform" and kind in config.kinds:
        return "layout=uniform: no field of the configuration says its size"
    return "not asked for"


def _report(
    captured: Captured,
    compact: GraphModule,
    deps: DependencyGraph,
    plan: Plan,
    decisions: Decisions,
    emission: Emission,
    seconds: dict[str, float],
    error: float,
    config: Config,
) -> Report:
    pruned = _group_reports(deps, plan, decisions, emission)
    left = tuple(
        Frozen(g.name, g.kind, g.reason or _why_left(g.kind, config))
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
        decisions.forward_passes,
        decisions.notes,
        peak_host(),
        peak_cuda(),
        shapes_of(*captured.inputs),
        *layer_seconds(deps, plan, decisions.cost),
        decisions.distances,
        decisions.ridges,
    )
