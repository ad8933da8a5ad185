"""The command line: `fasp-graph inspect | prune | eval | export | zoo`.

MODEL is zoo:NAME, a folder, package.module:factory or a hub id (fasp_graph/data.py). An error of
this project is one message on stderr and exit code 2; `--debug` shows where it came from.
"""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import models_zoo
from passes.capture import as_args, capture
from passes.errors import ConfigError, FaspGraphError

from .config import Config
from .data import Target, load_target, text_windows
from .demo import progress_bar, run_demo, table
from .evaluate import flops, latency, perplexity, size_of
from .huggingface import save
from .jsontext import to_json
from .onnx import export_graph
from .prune import Pruned, analyze, prune
from .view import to_html

app = typer.Typer(
    help="Prune any PyTorch model: find coupled layers, cut, repair, verify.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="zoo:NAME, folder, package.module:factory or hub id")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Text = Annotated[Path | None, typer.Option("--calibration", help="Text file to calibrate on.")]


def _console(stderr: bool = False) -> Console:
    """Off a terminal, lines are wide enough for the tables."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=max(console.width, 140))


@app.command("inspect")
def inspect_command(
    model: Model,
    frozen: Annotated[bool, typer.Option(help="List frozen groups too.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="PARAMETER", help="Why is this weight (not) prunable?")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write the graph as one HTML file.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which weights are coupled, and why the others are frozen."""
    target = load_target(model)
    deps = analyze(target.model, target.inputs)
    if html is not None:
        to_html(deps, html)
    if explain is not None:
        print(deps.explain(explain))
        return
    if json:
        print(to_json(deps.to_dict(), indent=1))
        return
    result = Table(title=escape(target.name), title_justify="left")
    for heading in ("group", "kind", "units", "blocks", "members", "consumers", "reason"):
        result.add_column(heading, overflow="fold")
    for group in deps.groups:
        if group.kind != "frozen" or frozen:
            result.add_row(
                *(
                    escape(text)
                    for text in (group.name, group.kind, str(group.size), str(group.blocks))
                ),
                escape(", ".join(sorted({m.parameter for m in group.members}))),
                escape(", ".join(sorted({c.parameter or c.node for c in group.consumers}))),
                escape(group.reason),
            )
    _console().print(result)


@app.command("prune")
def prune_command(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Without one: the demo.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of the parameters in scope to remove.")
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="best, fasp, slimgpt, flap, wanda, magnitude or random.")
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="obs, fasp, wanda_l2, magnitude, flap or random.")
    ] = None,
    restore: Annotated[
        str | None, typer.Option(help="none, bias, fasp, affine, asymmetric or residual.")
    ] = None,
    allocation: Annotated[
        str | None, typer.Option(help="uniform, sensitivity, curves or standardised.")
    ] = None,
    kinds: Annotated[
        list[str] | None, typer.Option(help="chain or bilinear; may be repeated.")
    ] = None,
    align: Annotated[int | None, typer.Option(help="Kept counts are multiples of this.")] = None,
    min_keep: Annotated[
        int | None, typer.Option(help="Units that every block keeps at least.")
    ] = None,
    ridge: Annotated[float | None, typer.Option(help="Ridge of the repair, relative.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    check: Annotated[
        bool | None, typer.Option("--check", help="Check labels after every op.")
    ] = None,
    calibration: Text = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Prune MODEL; with no MODEL, run the demo on the bundled language model."""
    flags: dict[str, Any] = {
        "sparsity": sparsity,
        "method": method,
        "score": score,
        "restore": restore,
        "allocation": allocation,
        "align": align,
    }
    flags |= {"kinds": tuple(kinds) if kinds else None, "min_keep": min_keep, "ridge": ridge}
    flags |= {"seed": seed, "check": check}
    given = {key: value for key, value in flags.items() if value is not None}
    if model is None:
        if given or calibration:
            names = ", ".join(
                f"--{key.replace('_', '-')}"
                for key in (*given, *(["calibration"] if calibration else []))
            )
            raise ConfigError(
                f"{names} without MODEL · help: name a model, say zoo:llama; the demo takes none "
                "of them"
            )
        _demo(output or Path("fasp-demo"), json)
        return
    config = Config(**given)
    target = load_target(model, calibration)
    with progress_bar(_console(stderr=True)) as bars:
        task = bars.add_task("capture", total=None)

        def progress(stage: str, done: int, total: int) -> None:
            bars.update(task, completed=done, total=total, description=stage)

        pruned = prune(target.model, target.inputs, target.calibration or None, config, progress)
    figures = _figures(target, pruned)
    if output is not None:
        figures["folder"] = str(save(pruned, output, tokenizer=target.tokenizer))
    if json:
        print(to_json({**figures, **pruned.report.to_dict()}, indent=1))
        return
    console = _console()
    console.print(escape(pruned.report.to_text()))
    for name, value in figures.items():
        console.print(escape(f"{name.replace('_', ' ')}: {value}"))


def _figures(target: Target, pruned: Pruned) -> dict[str, Any]:
    if target.heldout is None:
        return {}
    return {
        "perplexity_before": round(perplexity(target.model, target.heldout), 3),
        "perplexity_after": round(perplexity(pruned.model, target.heldout), 3),
    }


def _demo(output: Path, json: bool) -> None:
    rows = run_demo(output, _console(stderr=True))
    if json:
        print((output / "demo.json").read_text(encoding="utf-8"), end="")
        return
    console = _console()
    console.print(table(rows))
    console.print(
        "ppl: perplexity on held-out text. ms: one forward pass, median of alternating runs. "
        "max error: compact graph against the dense one with the same units zeroed, in float64."
    )
    console.print(
        escape(f"Written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    )


@app.command("eval")
def eval_command(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file to measure perplexity on.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window.")] = 256,
    windows: Annotated[int, typer.Option(help="Windows at most.")] = 64,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model: parameters, FLOPs, latency and, on text, perplexity."""
    target = load_target(model)
    if text is not None:
        if target.tokenizer is None:
            raise FaspGraphError(
                f"{model} has no tokenizer, so it has no perplexity on a text file"
            )
        target = replace(target, heldout=text_windows(text, target.tokenizer, length, windows))
    args, kwargs = as_args(target.inputs)
    parameters, size = size_of(target.model)

    def call() -> Any:
        with torch.no_grad():
            return target.model(*args, **kwargs)

    figures: dict[str, Any] = {
        "model": target.name,
        "parameters": parameters,
        "bytes": size,
        "flops": flops(target.model, args, kwargs),
        "latency_seconds": latency({"model": call})["model"]["median"],
    }
    if target.heldout is not None:
        figures["perplexity"] = perplexity(target.model, target.heldout[:windows])
    _show(figures, json)


@app.command("export")
def export_command(
    model: Model,
    output: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model, pruned or not, as ONNX, checked in ONNX Runtime."""
    target = load_target(model)
    captured = capture(target.model, target.inputs)
    path = export_graph(captured.graph_module, captured.inputs, captured.dynamic_shapes, output)
    _show({"onnx": str(path), "bytes": path.stat().st_size}, json)


@app.command("zoo")
def zoo_command(json: Json = False, debug: Debug = False) -> None:
    """List the models that come with fasp-graph."""
    rows = []
    for name in models_zoo.names():
        entry = models_zoo.load(name)
        rows.append(
            {
                "name": f"zoo:{name}",
                "class": type(entry.model).__name__,
                "parameters": size_of(entry.model)[0],
            }
        )
    if json:
        print(to_json(rows, indent=1))
        return
    result = Table("model", "class", "parameters")
    for row in rows:
        result.add_row(str(row["name"]), str(row["class"]), f"{row['parameters']:,}")
    _console().print(result)


def _show(figures: dict[str, Any], json: bool) -> None:
    if json:
        print(to_json(figures, indent=1))
        return
    for name, value in figures.items():
        text = (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4g}"
            if isinstance(value, float)
            else str(value)
        )
        _console().print(f"{escape(name.replace('_', ' '))}: {escape(text)}")


def main() -> None:
    """The console entry."""
    if "--debug" not in sys.argv:  # deprecations inside libraries mean nothing to the user
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
    try:
        app()
    except FaspGraphError as error:
        if "--debug" in sys.argv:
            raise
        message = f"{type(error).__name__}: {error}"
        Console(stderr=True).print(f"[red]{escape(message)}[/red]", soft_wrap=True, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
