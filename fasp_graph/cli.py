"""The command line: `fasp-graph inspect | prune | recover | eval | bench | export |
zoo`; a command a function in fasp_graph/commands/.

MODEL is zoo:NAME, a folder, package.module:factory or a hub id (fasp_graph/targets.py); DATA is
text, images or a factory (fasp_graph/corpora.py). The flags of `prune` are the fields of Config
(fasp_graph/commands/flags.py). Exit codes: 0 done, 1 an error inside, 2 an error of the call, its
data or its model, 130 interrupted. An error is one message on stderr; `--debug` shows where it
came from.
"""

from __future__ import annotations

import re
import sys
import traceback
import warnings
from typing import Annotated

import transformers
import typer
from rich.markup import escape

from passes.errors import FaspGraphError

from .commands.inspecting import inspect_command
from .commands.interrupts import interruptible
from .commands.measuring import bench_command, eval_command, export_command, zoo_command
from .commands.pruning import prune_command
from .commands.recovering import recover_command
from .commands.terminal import plain_console
from .folders.manifest import versions
from .scale.distributed import joined

app = typer.Typer(
    help="Prune any PyTorch model: find coupled layers, cut, repair, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        own, *others = (f"{name} {held}" for name, held in sorted(versions().items()))
        print(f"{own} ({', '.join(others)})")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show versions and exit.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass


for _name, _command in (
    ("inspect", inspect_command),
    ("prune", prune_command),
    ("recover", recover_command),
    ("eval", eval_command),
    ("bench", bench_command),
    ("export", export_command),
    ("zoo", zoo_command),
):
    app.command(_name)(interruptible(_command))


def main() -> None:
    """The console entry."""
    if "--debug" not in sys.argv:  # deprecations inside libraries mean nothing to the user
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
    try:
        with joined():
            app(prog_name="fasp-graph")  # however it is started, completion is of that name
    except FaspGraphError as error:
        _fail(error, 2)
    except OSError as error:  # where it names a path, that is no folder, full or not ours
        told = FaspGraphError(f"{error.filename}: {error.strerror} · help: another path")
        _fail(told if error.filename else error, 2 if error.filename else 1)
    except KeyboardInterrupt:  # outside of a command
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:  # the last stop before the user: never a page of traceback
        _fail(error, 1)


def in_flags(message: str) -> str:
    """A message whose help names flags where it named arguments: `lora=0` is `--lora 0`."""
    commands = typer.main.get_command(app).commands.values()  # type: ignore[attr-defined]
    held = [flag for command in commands for flag in command.params]
    names = {flag.name for flag in held if flag.param_type_name == "option"}
    told, found, way_out = message.partition("help: ")

    def flag(match: re.Match[str]) -> str:
        name, value = match[1], match[3] or ""
        if name not in names or not (match[2] or "_" in name):
            return match[0]
        return f"--{name.replace('_', '-')}" + (f" {value}" if match[2] else "")

    return told + found + re.sub(r"(?<![\w(.'-])(\w+)\b(?! =)(='?([\w./]*)'?)?", flag, way_out)


def _fail(error: Exception, code: int) -> None:
    """One message on stderr, with --debug the traceback instead, and the exit code."""
    if "--debug" in sys.argv:
        traceback.print_exception(error)
        sys.exit(code)
    inside = "" if code == 2 else " · help: this is a bug; run again with --debug and report it"
    message = f"{type(error).__name__}: {in_flags(str(error))}{inside}"
    told = f"[red]{escape(message)}[/red]"
    plain_console(stderr=True).print(told, soft_wrap=True, highlight=False)
    sys.exit(code)


if __name__ == "__main__":
    main()
