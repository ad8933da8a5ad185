"""The command line: `fasp-graph inspect | prune | recover | eval | bench | export |
zoo`; a command a function in fasp_graph/commands/.

MODEL is zoo:NAME, a folder, package.module:factory or a hub id (fasp_graph/targets.py); DATA is
text, images or a factory (fasp_graph/corpora.py). The flags of `prune` are the fields of Config
(fasp_graph/commands/flags.py). Exit codes: 0 done, 1 an error inside, 2 an error of the call, its
data or its model, 130 interrupted. An error is one message on stderr; `--debug` shows where it
came from.
"""

from __future__ import annotations

import sys
import warnings

import transformers
import typer
from rich.console import Console
from rich.markup import escape

from passes.errors import FaspGraphError

from .commands.inspecting import inspect_command
from .commands.interrupts import interruptible
from .commands.measuring import bench_command, eval_command, export_command, zoo_command
from .commands.pruning import prune_command
from .commands.recovering import recover_command
from .scale.distributed import joined

app = typer.Typer(
    help="Prune any PyTorch model: find coupled layers, cut, repair, verify.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
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
            app()
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
