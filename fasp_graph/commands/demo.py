"""The demo: prune the bundled language model at several sparsities, measure what is lost and won.

perplexity   on held-out text: dense, method=best, method=fasp, the same without repair, magnitude
latency      of the dense and the compact graph in torch and in ONNX Runtime, runs alternating
seconds      of a pruning run, on all cores but the one that meanwhile exports to ONNX
"""

from __future__ import annotations

import copy
import multiprocessing
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.fx import GraphModule

from passes.capture import Args, as_args
from passes.errors import ConfigError, FaspGraphError

from ..config import Config
from ..data import load_target
from ..evaluate import flops, perplexity, size_of, spread
from ..exports.onnx import graph_call, onnx_session, run_session, write_graph
from ..folders.huggingface import save
from ..jsontext import to_json
from ..pages.view import to_html
from ..prune import Program, Pruned, prune, read
from ..targets import Target
from ..timing import latency
from .progress import progress_bar, staged

SPARSITIES = (0.1, 0.2, 0.3, 0.5)
WRITTEN = 0.3
RECORD = "demo.json"
BATCHES = 2  # of calibration: 8,192 tokens of the bundled model's
VARIANTS: dict[str, dict[str, str]] = {
    "fasp": {"method": "fasp"},
    "no_repair": {"method": "fasp", "restore": "none"},
    "magnitude": {"method": "magnitude"},
    "best": {"method": "best"},
}


@dataclass(frozen=True)
class Row:
    """One line of the table; `perplexity`: variant -> value; latency in seconds."""

    name: str
    perplexity: dict[str, float]
    parameters: int
    bytes: int
    flops: int
    latency: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    verify_max_error: float | None = None


def refuse_others(output: Path) -> None:
    """ConfigError if `output` is, or holds, what no earlier demo wrote."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"{output} is a file · help: --output names a folder")
    if output.is_dir() and any(output.iterdir()) and not (output / RECORD).is_file():
        raise ConfigError(
            f"{output} holds files of no earlier demo, which could be lost · help: --output FOLDER"
        )


def run_demo(
    output: Path,
    console: Console,
    target: Target | None = None,
    sparsities: tuple[float, ...] = SPARSITIES,
    windows: int = 32,
    repeats: int = 11,
) -> list[Row]:
    """Write a pruned folder, ONNX, graph.html and demo.json into `output`; return the rows."""
    target = target or load_target("zoo:llama")
    if target.heldout is None:
        raise FaspGraphError(
            f"{target.name} has no held-out tokens, so the demo cannot measure it · help: "
            "zoo:llama and zoo:opt have some"
        )
    heldout = spread(target.heldout, windows)
    target = replace(target, calibration=target.calibration[:BATCHES])
    written = min(sparsities, key=lambda value: abs(value - WRITTEN))
    output.mkdir(parents=True, exist_ok=True)
    sample = as_args(_sized(target.inputs, heldout[:2]))
    files: dict[str, tuple[Path, Future[float]]] = {}
    _record(output, target, heldout, sample, [])  # if interrupted, the next demo may replace it
    with progress_bar(console) as bars, tempfile.TemporaryDirectory() as scratch:
        whole = bars.add_task("dense model", total=len(sparsities) * (len(VARIANTS) + 1) + 3)
        step, inner = _stepper(bars, whole), staged(bars, "  ")
        with exporter() as process:
            program = read(target.model, target.inputs)
            dense, module = program.captured, program.captured.graph_module
            path = Path(scratch) / "0.onnx"
            plain = copy.deepcopy(module)  # without torch.export's hooks, which cannot be sent
            call = (plain, dense.inputs, dense.dynamic_shapes, path)
            files["dense"] = path, process.submit(write_graph, *call)
            graphs = {"dense": module}
            rows = [_row("dense", {"dense": perplexity(target.model, heldout)}, module, sample)]
            for sparsity in sparsities:
                name = f"{sparsity:.0%}"
                stem = f"{target.name}-{name.rstrip('%')}"
                path = (output if sparsity == written else Path(scratch)) / f"{stem}.onnx"
                pruned, row, file = _prune_all(
                    target, program, heldout, sparsity, sample, step, inner, process, path
                )
                files[name] = path, file
                rows.append(row)
                graphs[name] = pruned.graph_module
                if sparsity == written:
                    _write(pruned, output, stem, target.tokenizer)
            for name, (_, file) in files.items():
                step(f"{name} to ONNX")
                file.result()
        calls: dict[str, Callable[[], Any]] = {}
        for name, (path, _) in files.items():
            calls[f"{name} torch"] = _graph_call(graphs[name], sample)
            calls[f"{name} onnx"] = _session_call(path, sample)
        step("latency, runs alternating")
        times = latency(calls, repeats)
    rows = [
        replace(row, latency={kind: times[f"{row.name} {kind}"] for kind in ("torch", "onnx")})
        for row in rows
    ]
    _record(output, target, heldout, sample, rows)
    return rows


@contextmanager
def exporter() -> Iterator[Executor]:
    """A process for the exports, which keep one core busy; torch leaves it one meanwhile."""
    threads = torch.get_num_threads()
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _in_exporter)
    torch.set_num_threads(max(1, threads - 1))
    try:
        yield process
    finally:
        process.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _in_exporter() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the demo itself is interrupted, and ends it
    torch.set_num_threads(1)


def _prune_all(
    target: Target,
    program: Program,
    heldout: Tensor,
    sparsity: float,
    sample: Args,
    step: Callable[[str], None],
    progress: Callable[[str, int, int], None],
    process: Executor,
    path: Path,
) -> tuple[Pruned, Row, Future[float]]:
    """Every variant at one sparsity; the pruned model, its figures and its file are those of fasp,
    the first.
    """
    values: dict[str, float] = {}
    chosen: Pruned | None = None
    seconds = 0.0
    for variant, options in VARIANTS.items():
        step(f"{sparsity:.0%} {variant.replace('_', ' ')}")
        config = Config(sparsity=sparsity, **options)  # type: ignore[arg-type]
        started = time.perf_counter()
        pruned = prune(target.model, target.inputs, target.calibration, config, progress, program)
        elapsed = time.perf_counter() - started
        values[variant] = perplexity(pruned.model, heldout)
        if chosen is None:
            chosen, seconds = pruned, elapsed
            file = process.submit(write_graph, *graph_call(pruned, path))
    assert chosen is not None
    row = _row(f"{sparsity:.0%}", values, chosen.graph_module, sample)
    error = chosen.report.verify_max_error
    return chosen, replace(row, seconds=seconds, verify_max_error=error), file


def _row(name: str, values: dict[str, float], module: GraphModule, sample: Args) -> Row:
    parameters, size = size_of(module)
    return Row(name, values, parameters, size, flops(module, *sample))


def _write(pruned: Pruned, output: Path, name: str, tokenizer: Any) -> None:
    save(pruned, output / name, tokenizer=tokenizer)
    to_html(pruned.deps, output / "graph.html", pruned.plan, pruned.report, name)


def _record(output: Path, target: Target, heldout: Tensor, sample: Args, rows: list[Row]) -> None:
    figures = {
        "model": target.name,
        "heldout_tokens": heldout.numel(),
        "latency_input": [
            list(v.shape) for v in (*sample[0], *sample[1].values()) if isinstance(v, Tensor)
        ],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "rows": [vars(row) for row in rows],
    }
    (output / RECORD).write_text(to_json(figures, indent=1) + "\n", encoding="utf-8")


HEADINGS = (
    *("removed", "ppl best", "fasp", "no repair", "magnitude", "params", "MB", "GFLOPs"),
    *("torch ms", "ORT ms", "seconds", "max error"),
)
WIDE = 122  # columns of a terminal that shows all headings side by side


def table(rows: list[Row], width: int = WIDE) -> Table:
    """The rows as the demo prints them; on a narrow terminal they stand side by side."""
    lines = [HEADINGS, *map(_cells, rows)]
    lines = lines if width >= WIDE else list(zip(*lines, strict=True))
    result = Table(title="Structured pruning, measured", title_justify="left", header_style="bold")
    for number, heading in enumerate(lines[0]):
        result.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for line in lines[1:]:
        result.add_row(*line)
    return result


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        _number(row.perplexity.get("best", row.perplexity.get("dense"))),
        *(_number(row.perplexity.get(key)) for key in ("fasp", "no_repair", "magnitude")),
        f"{row.parameters / 1e6:.2f}M",
        f"{row.bytes / 1e6:.1f}",
        f"{row.flops / 1e9:.2f}",
        *(f"{row.latency[kind]['median'] * 1e3:.1f}" for kind in ("torch", "onnx")),
        f"{row.seconds:.1f}" if row.seconds else "",
        "" if row.verify_max_error is None else f"{row.verify_max_error:.0e}",
    )


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e4 else f"{value:.1e}"


def _sized(inputs: Any, tokens: Tensor) -> Any:
    """Example inputs of the size of `tokens`."""
    if isinstance(inputs, dict):
        return {k: tokens if k == "input_ids" else torch.ones_like(tokens) for k in inputs}
    return (tokens,) if isinstance(inputs, (tuple, list)) else tokens


def _graph_call(module: GraphModule, sample: Args) -> Callable[[], Any]:
    return lambda: module(*sample[0], **sample[1])


def _session_call(path: Path, sample: Args) -> Callable[[], Any]:
    session = onnx_session(path)
    return lambda: run_session(session, sample)


def _stepper(bars: Progress, task: Any) -> Callable[[str], None]:
    def step(description: str) -> None:
        bars.update(task, advance=1, description=description)

    return step
