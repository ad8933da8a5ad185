"""The commands that measure and convert: eval, bench, export, zoo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table

import models_zoo
from passes.capture import as_args
from passes.errors import ConfigError

from ..bench import Result, bench
from ..data import load_target
from ..evaluate import flops, shapes_of, size_of
from ..exports.export import FORMATS as EXPORTS
from ..exports.export import Options, export_source, source_of
from ..exports.onnx import EXTERNAL_DATA_BYTES
from ..exports.onnx_reduce import DTYPES
from ..jsontext import to_json
from ..measures import tasks
from ..quality import Quality
from ..targets import Target, refuse_unrunnable
from ..timing import latency
from ..units import in_bytes, in_flops
from .cells import figures_table
from .terminal import (
    DATA_HELP,
    Debug,
    Device,
    Json,
    Length,
    Model,
    Windows,
    known_models,
    said,
    show,
    stages,
    wide_console,
    writable,
)


def eval_command(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            "--text",
            metavar="DATA",
            help=f"Text, or a folder with a folder of images for each class: {DATA_HELP}.",
        ),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense encoder, to be similar to.",
            autocompletion=known_models,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A task of lm-evaluation-harness; may be repeated."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of each task at most.", min=1)] = None,
    length: Length = 256,
    windows: Windows = 64,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens between windows; fewer than --length: overlap.", min=1),
    ] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model: parameters, FLOPs, latency, and its quality on data.

    On text that is perplexity, or with --reference the similarity of embeddings; on images with
    labels accuracy; with --task the accuracy of tasks.
    """
    if limit is not None and not task:
        raise ConfigError("--limit counts samples of a task · help: --task NAME, or --windows")
    with stages("load model and data"):
        target = load_target(model, device=device)
        quality = Quality(target, data, reference, length, windows, stride)
    with stages("measure"):
        figures = _costs(target)
        figures |= quality.measure()
        if task:
            figures |= tasks(target.model, target.tokenizer, task, limit)
    show(figures, json)


def _costs(target: Target) -> dict[str, Any]:
    """Sizes, and what one call at the example inputs takes."""
    args, kwargs = as_args(target.inputs)
    refuse_unrunnable(target, args, kwargs)
    parameters, size = size_of(target.model)

    def call() -> Any:
        with torch.no_grad():
            return target.model(*args, **kwargs)

    return {
        "model": target.name,
        "parameters": parameters,
        "bytes": size,
        "inputs": shapes_of(args, kwargs),
        "flops": flops(target.model, args, kwargs),
        "latency_ms": latency({"model": call})["model"]["median"] * 1e3,
    }


def bench_command(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL",
            help="Say, the dense and the pruned one.",
            autocompletion=known_models,
        ),
    ],
    data: Annotated[
        str | None, typer.Option("--data", metavar="DATA", help="Text to measure perplexity on.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per call.", min=1)] = 1,
    length: Annotated[int, typer.Option(help="Tokens per sequence.", min=2)] = 128,
    runs: Annotated[int, typer.Option(help="Timed runs of each.", min=2)] = 15,
    onnx: Annotated[bool, typer.Option(help="Also in ONNX Runtime.")] = True,
    memory: Annotated[bool, typer.Option(help="Peak memory, in a process of its own.")] = True,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch and ONNX Runtime.", min=1)
    ] = None,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare models: alternating runs in torch and ONNX Runtime, median, spread, memory.

    "times as fast" is against the first model, with the range that the runs leave open.
    """
    with stages("load models and data"):
        targets = [load_target(model, evaluation=data, device=device) for model in models]
    with stages("bench") as step:
        found = bench(targets, batch, length, runs, onnx, memory, threads, step)
    for row in found:
        said(f"warning: {row.warning}") if row.warning else None
    if json:
        print(to_json([vars(result) for result in found], indent=1))
        return
    wide_console().print(_table(found))


def _table(found: list[Result]) -> Table:
    """A row for each model in each runtime; what was measured of none has no column."""
    cells = [_cells(row) for row in found]
    heads = [head for head in cells[0] if any(row[head] for row in cells)]
    result = figures_table(*heads, words=2)
    for row in cells:
        result.add_row(*(row[head] for head in heads))
    return result


def _cells(row: Result) -> dict[str, str]:
    """Heading -> text."""
    digits = 2 if row.median >= 1e-3 else 4
    return {
        "model": escape(row.model),
        "runtime": row.runtime,
        "parameters": f"{row.parameters:,}",
        "weights": in_bytes(row.bytes),
        "one call": in_flops(row.flops),
        "ms": f"{row.median * 1e3:.{digits}f}",
        "± IQR": f"{row.spread * 1e3:.{digits}f}",
        "times as fast": _times(row),
        "tokens/s": "" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "peak memory": "" if row.peak_memory is None else in_bytes(row.peak_memory),
        "perplexity": "" if row.perplexity is None else f"{row.perplexity:.3f}",
    }


def _times(row: Result) -> str:
    """1.25 (1.19-1.31)"""
    if row.speedup is None or row.speedup_range is None:
        return ""
    low, high = row.speedup_range
    return f"{row.speedup:.2f} ({low:.2f}-{high:.2f})"


def export_command(
    model: Model,
    output: Annotated[
        Path, typer.Argument(metavar="PATH", help="FILE.onnx, FILE.pt2; a folder for parts.")
    ],
    format: Annotated[
        str | None,
        typer.Option(help=f"One of {', '.join(EXPORTS)}; without it pt2 for PATH.pt2, else onnx."),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option("--cache", help="onnx: past_key_values, or the parts of an encoder-decoder."),
    ] = False,
    dtype: Annotated[str, typer.Option(help=f"onnx: one of {', '.join(DTYPES)}.")] = "float32",
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DATA", help="onnx: text for the file's perplexity."),
    ] = None,
    length: Length = 256,
    windows: Windows = 64,
    external_data_bytes: Annotated[
        int,
        typer.Option(metavar="BYTES", help="onnx: weights of more bytes lie in PATH.data.", min=0),
    ] = EXTERNAL_DATA_BYTES,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model, pruned or not, as ONNX or .pt2; run and compared before it appears."""
    form = format or ("pt2" if output.suffix == ".pt2" else "onnx")
    options = Options(cache, dtype, None, external_data_bytes)
    _exportable(output, form, cache)
    with stages("load model and data") as progress:
        target = load_target(model, length=length, count=windows, evaluation=data)
        tokens = None if data is None or target.heldout is None else target.heldout[:windows]
        progress("capture, write, compare")
        source = source_of(target, cache)
        found = export_source(source, output, form, replace(options, tokens=tokens))
    show(found.to_dict(), json)


def _exportable(output: Path, form: str, cache: bool) -> None:
    """Refuse what cannot be written, before the model is loaded; parts make a folder."""
    if form not in EXPORTS:
        raise ConfigError(f"no format {form!r} · help: one of {', '.join(EXPORTS)}")
    if cache and output.suffix != ".onnx":
        return
    writable(output)
    ending = ".onnx" if form == "onnx" else ".pt2"
    if output.suffix != ending:
        raise ConfigError(f"{output.name} must end in {ending} · help: {output.stem}{ending}")


def zoo_command(json: Json = False, debug: Debug = False) -> None:
    """List the models that come with fasp-graph."""
    rows = [
        {"name": f"zoo:{name}", "class": kind, "parameters": size}
        for name, (kind, size) in models_zoo.MODELS.items()
    ]
    if json:
        print(to_json(rows, indent=1))
        return
    result = figures_table("model", "class", "parameters", words=2)
    for row in rows:
        result.add_row(str(row["name"]), str(row["class"]), f"{row['parameters']:,}")
    wide_console().print(result)
