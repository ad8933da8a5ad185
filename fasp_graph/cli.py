"""The command line: `fasp-graph inspect | prune | recover | eval | bench | export |
zoo`.

MODEL is zoo:NAME, a folder, package.module:factory or a hub id (fasp_graph/data.py); DATA is text,
images or a factory (fasp_graph/corpora.py). The flags of `prune` are the fields of Config
(fasp_graph/commands/flags.py). Exit codes: 0 done, 1 an error inside, 2 an error of the call, its
data or its model, 130 interrupted. An error is one message on stderr; `--debug` shows where it
came from.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import transformers
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from passes.capture import as_args
from passes.errors import ConfigError, FaspGraphError
from passes.lazy import is_lazy

from .commands.demo import run_demo, table
from .commands.dryrun import dry_run
from .commands.flags import config_from, given_flags, with_config_flags
from .commands.listing import groups_table
from .commands.measuring import bench_command, eval_command, export_command, zoo_command
from .commands.recovering import recover_command
from .commands.terminal import (
    DATA_HELP,
    Debug,
    Json,
    Length,
    Model,
    Windows,
    known_models,
    show,
    stages,
    warn,
    wide_console,
    writable,
)
from .config import Config
from .data import Target, load_target
from .evaluate import latency, perplexity
from .folders.huggingface import refuse_foreign, save
from .jsontext import to_json
from .pages.graphfiles import FORMATS, text, write
from .pages.report_page import write_report
from .pages.view import to_html
from .prune import Pruned, analyze, prune
from .scale.distributed import joined, world
from .scale.journal import close, work_folder

app = typer.Typer(
    help="Prune any PyTorch model: find coupled layers, cut, repair, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.command("inspect")
def inspect_command(
    model: Model,
    frozen: Annotated[bool, typer.Option(help="List frozen groups too.")] = False,
    explain: Annotated[
        str | None, typer.Option(metavar="PARAMETER", help="Why is this weight (not) prunable?")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write the viewer, one HTML file that needs no network.")
    ] = None,
    format: Annotated[
        str | None, typer.Option(help=f"Print the graph as {', '.join(FORMATS)}.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File for --format; its ending chooses the format.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show which weights are coupled, and why the others are frozen.

    Names that differ by layer numbers only are one row (layers.0-31, x32); --json tells each.
    """
    form = format or (output.suffix.lstrip(".") if output else None)
    form = {"mmd": "mermaid", "gv": "dot"}.get(form or "", form)
    if form is not None and form not in FORMATS:
        raise ConfigError(f"no format {form!r} · help: --format {', '.join(FORMATS)}")
    with stages("load"):
        target = load_target(model)
    with stages("analyse"):
        deps = analyze(target.model, target.inputs)
    if html is not None:
        writable(html)
        to_html(deps, html)
    if output is not None and form:
        writable(output)
        write(deps, form, output)
    elif form:
        print(text(deps, form), end="")
    elif explain is not None:
        print(deps.explain(explain))
    elif json:
        print(text(deps, "json"), end="")
    else:
        wide_console().print(groups_table(target.name, deps, frozen))


@app.command("prune")
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
    json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Prune MODEL; with no MODEL, run the demo on the bundled language model."""
    if model is None:
        _no_model(given_flags(flags), calibration, evaluation, config, dry_run)
        _demo(output or Path("fasp-demo"), json)
        return
    options = config_from(config, flags)
    if output is not None:  # before hours of work
        refuse_foreign(output.resolve())
    with stages("load model and data"):
        target = load_target(model, calibration, length, windows, evaluation, stream)
    if dry_run:
        _show_dry_run(target, options, json)
        return
    with stages("capture") as progress:
        data = target.calibration or None
        work = work_folder(output) if output is not None and (resume or stream) else None
        pruned = prune(target.model, target.inputs, data, options, progress, work=work)
        progress("measure")
        figures = _figures(target, pruned)
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
    console.print(escape(pruned.report.to_text()))
    show(figures, False)


def _no_model(given: dict[str, Any], *rest: Any) -> None:
    names = ("calibration", "evaluation", "config", "dry_run")
    said = [*given, *(name for name, value in zip(names, rest, strict=True) if value)]
    if said:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in said)
        raise ConfigError(
            f"{flags} without MODEL · help: name a model, say zoo:llama; the demo takes none of "
            "them"
        )


def _show_dry_run(target: Target, options: Config, json: bool) -> None:
    found = dry_run(target, options)
    if json:
        print(to_json(found.to_dict(), indent=1))
        return
    result = Table("group", "units per block", "keeps", title="Plan, nothing pruned")
    for name, count in found.keep.items():
        result.add_row(escape(name), str(found.sizes[name]), str(count))
    wide_console().print(result)
    wide_console().print(
        f"parameters {found.params_before:,} -> {found.params_after:,}, {found.removed:.1%} of all "
        f"and {found.sparsity:.1%} of those in scope; {len(found.frozen)} groups frozen; about "
        f"{found.expected_seconds:.0f} s"
    )
    if not found.exact:
        wide_console().print(
            f"The counts are those of uniform allocation. method={options.method} spreads the "
            f"sparsity over the groups by the calibration data (allocation="
            f"{options.passes.allocation}), so a run keeps other numbers of each group, and about "
            "as many parameters; with --allocation uniform it keeps these."
        )


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
        data = _public(calibration or own)
        found["calibration data"] = f"{data}, {len(target.calibration)} batches"
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
    def pages(folder: Path) -> None:
        write_report(folder, target.name, pruned.report.to_dict(), figures)
        to_html(pruned.deps, folder / "graph.html", pruned.plan, pruned.report)

    return Path(save(pruned, output, tokenizer=target.tokenizer, facts=facts, extra=pages))


def _demo(output: Path, json: bool) -> None:
    rows = run_demo(output, wide_console(stderr=True))
    if json:
        print((output / "demo.json").read_text(encoding="utf-8"), end="")
        return
    console = wide_console()
    console.print(table(rows))
    console.print(
        "ppl: perplexity on held-out text. ms: one forward pass, median of alternating runs. "
        "max error: compact graph against the dense one with the same units zeroed, in float64."
    )
    console.print(
        escape(f"Written to {output}: {', '.join(sorted(p.name for p in output.iterdir()))}")
    )


for _name, _command in (
    ("recover", recover_command),
    ("eval", eval_command),
    ("bench", bench_command),
    ("export", export_command),
    ("zoo", zoo_command),
):
    app.command(_name)(_command)


def main() -> None:
    """The console entry."""
    if "--debug" not in sys.argv:  # deprecations inside libraries mean nothing to the user
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
    try:
        with joined():
            app()
    except FaspGraphError as error:
        _fail(error, 2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the last stop before the user: never a page of traceback
        _fail(error, 1)


def _fail(error: Exception, code: int) -> None:
    """One message on stderr, and the exit code; with --debug the traceback."""
    if "--debug" in sys.argv:
        raise error
    inside = "" if code == 2 else " · help: this is a bug; run again with --debug and report it"
    message = f"{type(error).__name__}: {error}{inside}"
    Console(stderr=True).print(f"[red]{escape(message)}[/red]", soft_wrap=True, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
