"""The command that shows the groups: inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from passes.errors import ConfigError
from passes.groups import DependencyGraph

from ..data import load_target
from ..jsontext import to_json
from ..pages.graphfiles import FORMATS, text, write
from ..pages.view import to_html
from ..prune import analyze
from .listing import groups_table
from .terminal import Debug, Json, Model, one_of, said, stages, wide_console, writable


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

    Names that differ by layer numbers only are one row (layers.{0..31}); --json tells each.
    """
    asked = {"--explain": explain, "--format or --output": format or output, "--json": json}
    one_of({name: asked[name] for name in ("--explain", "--format or --output")})
    one_of({name: asked[name] for name in ("--json", "--format or --output")})
    form = _form(format, output)
    for path in filter(None, (html, output)):
        writable(path)
    with stages("load"):
        target = load_target(model)
    with stages("analyse"):
        deps = analyze(target.model, target.inputs)
    if html is not None:
        said(f"wrote {to_html(deps, html, name=target.name)}")
    if output is not None and form:
        said(f"wrote {write(deps, form, output)}")
    elif form:
        print(text(deps, form), end="")
    elif explain is not None:
        print(_explained(deps, explain) if json else deps.explain(explain))
    elif json:
        print(text(deps, "json"), end="")
    else:
        console = wide_console()
        console.print(groups_table(target.name, deps, frozen, console.width))


def _explained(deps: DependencyGraph, parameter: str) -> str:
    """`explain` as JSON: the words, and the groups of the weight."""
    words = deps.explain(parameter)
    groups = [
        group.to_dict()
        for group in deps.groups
        if any(member.parameter == parameter for member in group.members)
    ]
    found = {"parameter": parameter, "shape": deps.parameters[parameter], "groups": groups}
    return to_json({**found, "explanation": words}, indent=1)


def _form(format: str | None, output: Path | None) -> str | None:
    """What the graph is written as: as asked, or as the file's ending says; None: as a table."""
    form = format or (output.suffix.lstrip(".") if output else None)
    form = {"mmd": "mermaid", "gv": "dot"}.get(form or "", form)
    if form is not None and form not in FORMATS:
        viewer = "--html FILE writes the viewer; " if form == "html" else ""
        known = ", ".join(FORMATS)
        if not form:
            raise ConfigError(f"the ending of {output} names no format · help: one of {known}")
        raise ConfigError(f"no format {form!r} · help: {viewer}--format {known}")
    return form
