"""The command that prunes, measures and writes: prune."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from passes.capture import as_args
from passes.errors import ConfigError
from passes.lazy import is_lazy

from ..calibration import refuse_dataless
from ..config import Config
from ..data import load_target
from ..evaluate import perplexity
from ..folders.huggingface import refuse_foreign, save
from ..folders.manifest import versions
from ..folders.settings import refuse_undersized
from ..inputs import refuse_unstreamable
from ..jsontext import to_json
from ..pages.report_page import write_report
from ..pages.view import to_html
from ..prune import Pruned, prune
from ..scale.distributed import world
from ..scale.journal import close, work_folder
from ..targets import Target
from ..timing import latency
from ..units import counted
from .cells import share_tables
from .demo import RECORD, refuse_others, run_demo, table
from .dryrun import show_dry_run
from .flags import config_from, given_flags, with_config_flags
from .terminal import (
    DATA_HELP,
    Debug,
    Device,
    Json,
    Length,
    Windows,
    known_models,
    show,
    stages,
    warn,
    wide_console,
    writable_folder,
)


@with_config_flags
def prune_command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Without one: the demo.", autocompletion=known_models),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="DATA", help=f"What to calibrate on: {DATA_HELP}.")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(metavar="DATA", help="Text to measure perplexity on.")
    ] = None,
    length: Length = 256,
    windows: Windows = 64,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Options; flags overrule them.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write: model, report.html, graph.html.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes and counts of uniform allocation.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="MODEL is a folder too large for memory.")
    ] = False,
    resume: Annotated[
        bool, typer.Option(help="Go on where an interrupted run with this --output was.")
    ] = True,
    device: Device = None,
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Prune MODEL; with no MODEL, run the demo on the bundled language model."""
    if model is None:
        given = given_flags(flags)
        _no_model(given, calibration, evaluation, config, dry_run, stream, device)
        _demo(output or Path("fasp-demo"), json)
        return
    options = config_from(config, flags)
    refuse_unstreamable(stream, options)
    if output is not None:  # before hours of work
        writable_folder(output)
        refuse_foreign(output)
    with stages("load model and data"):
        target = load_target(model, calibration, length, windows, evaluation, stream, device)
    if output is not None:
        shapes = {name: tuple(held.shape) for name, held in target.model.named_parameters()}
        refuse_undersized(target.model, shapes)
    if dry_run:
        show_dry_run(target, options, json)
        return
    refuse_dataless(target.calibration or None, options)
    work = work_folder(output) if output is not None and (resume or stream) else None
    pruned, figures = _run(target, options, work)
    if world()[0]:  # all ranks hold the same result; rank 0 speaks and writes
        return
    warn(pruned.report.notes)
    if output is not None:
        facts = _facts(target, calibration, evaluation, figures)
        figures["folder"] = str(_write(target, pruned, output, figures, facts))
        close(work_folder(output))
    if json:
        print(to_json({**figures, **pruned.report.to_dict()}, indent=1))
        return
    console = wide_console()
    for shares in share_tables(pruned.report.to_dict()["groups"], console.width):
        console.print(shares)
    console.print(escape(pruned.report.to_text()))
    show(figures, False)


def _no_model(given: dict[str, Any], *rest: Any) -> None:
    names = ("calibration", "evaluation", "config", "dry_run", "stream", "device")
    said = [*given, *(name for name, value in zip(names, rest, strict=True) if value)]
    if said:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise ConfigError(
            f"{flags} without MODEL · help: name a model, say zoo:llama; the demo takes none of "
            "them"
        )


def _run(target: Target, options: Config, work: Path | None) -> tuple[Pruned, dict[str, Any]]:
    """Prune, and measure before and after."""
    with stages("capture") as progress:
        data = target.calibration or None
        pruned = prune(target.model, target.inputs, data, options, progress, work=work)
        progress("measure")
        return pruned, _figures(target, pruned)


def _figures(target: Target, pruned: Pruned) -> dict[str, Any]:
    """Latency of the example inputs, and perplexity where there is text."""
    args, kwargs = as_args(target.inputs)
    calls: dict[str, Callable[[], Any]] = {
        "before": lambda: target.model(*args, **kwargs),
        "after": lambda: pruned.model(*args, **kwargs),
    }
    times = {} if is_lazy(target.model) else latency(calls, repeats=5, warmup=1)
    found: dict[str, Any] = {f"latency_ms_{k}": t["median"] * 1e3 for k, t in times.items()}
    if times:
        found["latency_inputs"] = pruned.report.inputs
    if target.heldout is not None:
        found["perplexity_before"] = perplexity(target.model, target.heldout)
        found["perplexity_after"] = perplexity(pruned.model, target.heldout)
    return found


def _facts(
    target: Target, calibration: str | None, evaluation: str | None, figures: dict[str, Any]
) -> dict[str, Any]:
    """Lines of the model card: what was measured, and on what."""
    own = f"that of {target.name}"
    found = {"model": _public(target.source or target.name)}
    if target.calibration:
        batches = counted(len(target.calibration), "batch", "batches")
        found["calibration data"] = f"{_public(calibration or own)}, {batches}"
    if "perplexity_before" in figures:
        found["evaluation data"] = _public(evaluation or own)
        found["perplexity before"] = f"{figures['perplexity_before']:.2f}"
        found["perplexity after"] = f"{figures['perplexity_after']:.2f}"
    return found


def _public(source: str) -> str:
    """A source as a card may name it: of a path on this machine, only its last part."""
    return Path(source).resolve().name if Path(source).exists() else source


def _write(
    target: Target,
    pruned: Pruned,
    output: Path,
    figures: dict[str, Any],
    facts: dict[str, Any],
) -> Path:
    told = {name: held for name, held in facts.items() if not name.startswith("perplexity")}
    asked = {**told, **asdict(pruned.config), "versions": versions()}

    def pages(folder: Path) -> None:
        write_report(folder, target.name, pruned.report.to_dict(), figures, asked)
        to_html(pruned.deps, folder / "graph.html", pruned.plan, pruned.report, target.name)

    return Path(save(pruned, output, tokenizer=target.tokenizer, facts=facts, extra=pages))


def _demo(output: Path, json: bool) -> None:
    refuse_others(output)
    rows = run_demo(output, wide_console(stderr=True))
    if json:
        print((output / RECORD).read_text(encoding="utf-8"), end="")
        return
    console = wide_console()
    console.print(table(rows, console.width))
    console.print(
        "ppl: perplexity on held-out text. ms: one forward pass, median of alternating runs. "
        "max error: compact graph against the dense one with the same units zeroed, in float64."
    )
    names = sorted(path.name for path in output.iterdir())
    console.print(escape(f"In {output}: {', '.join(names)}"))
