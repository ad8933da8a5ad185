"""What all commands share: arguments, consoles, progress, figures as text or JSON."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import models_zoo
from passes.errors import ConfigError

from ..jsontext import to_json
from .progress import progress_bar, staged


def known_models(incomplete: str) -> list[str]:
    """What a shell offers for MODEL."""
    return [f"zoo:{n}" for n in models_zoo.names() if f"zoo:{n}".startswith(incomplete)]


MODEL_HELP = "zoo:NAME, folder, package.module:factory, folder@package.module:factory or hub id"
DATA_HELP = (
    "a text, jsonl or parquet file, a folder of texts or images, wikitext2, c4, ptb, owner/name, "
    "package.module:factory"
)
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help=MODEL_HELP, autocompletion=known_models)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Length = Annotated[int, typer.Option(help="Tokens per window of text.", min=2)]
Device = Annotated[
    str | None,
    typer.Option(metavar="DEVICE", help="Where the model runs: cpu, cuda, cuda:1, mps."),
]
Windows = Annotated[int, typer.Option(help="Windows of text, or images, at most.", min=1)]


def plain_console(stderr: bool = False, width: int | None = None) -> Console:
    """A console that prints what it is given: `:x:` in a name is no picture of a cross."""
    return Console(stderr=stderr, width=width, emoji=False)


def wide_console(stderr: bool = False) -> Console:
    """Off a terminal, lines are wide enough for the tables."""
    console = plain_console(stderr)
    return console if console.is_terminal else plain_console(stderr, max(console.width, 140))


@contextmanager
def stages(first: str) -> Iterator[Any]:
    """A bar on stderr, with what is being done, how far, for how long; silent off a terminal."""
    with progress_bar(wide_console(stderr=True)) as bars:
        progress = staged(bars)
        progress(first)
        yield progress


def one_of(given: dict[str, Any]) -> None:
    """Refuse flags that ask for different outputs: name -> value."""
    names = [name for name, value in given.items() if value]
    if names[1:]:
        raise ConfigError(f"{' and '.join(names)} contradict each other · help: one of them")


def said(text: str) -> None:
    """A line on stderr, beside the result."""
    plain_console(stderr=True).print(escape(text), soft_wrap=True, highlight=False)


def writable_folder(path: Path) -> None:
    """Refuse a folder that cannot be made since a file is in its way, before any work is done."""
    for folder in (path, *path.parents):
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"cannot write {path}: {folder} is a file · help: --output names a folder"
            )


def writable(path: Path) -> None:
    """Refuse a path in a folder that is not there, before any work is done."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder · help: name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: no folder {path.parent} · help: create it first")


def warn(notes: tuple[str, ...]) -> None:
    """The first note of a report, on stderr; there may be one for every layer."""
    if notes:
        rest = f" · {len(notes) - 1} more like it in the report" if notes[1:] else ""
        said(f"warning: {notes[0]}{rest}")


def show(figures: dict[str, Any], json: bool) -> None:
    """Figures by name, as lines or as JSON."""
    if json:
        print(to_json(figures, indent=1))
        return
    for name, value in figures.items():
        text = (
            f"{value:,}"
            if isinstance(value, int)
            else f"{value:.4g}"
            if isinstance(value, float)
            else ", ".join(map(str, value))
            if isinstance(value, (list, tuple))
            else str(value)
        )
        wide_console().print(f"{escape(name.replace('_', ' '))}: {escape(text)}")
