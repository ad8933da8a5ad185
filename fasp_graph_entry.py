"""What `fasp-graph` and `python -m fasp_graph` start: outside the package, since it goes before
the libraries, which take seconds to load. An interrupt meanwhile is told like any other, and
OpenMP, which reads its variables as it loads, is asked to sleep where it waits: on a machine that
does other things too, threads that spin for each other make torch many times slower.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any


def _leave(*_: Any) -> None:
    """Nothing is done yet, so nothing is to be undone."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def _told_at_once(now: bool) -> None:
    """Whether Ctrl-C ends the process on the spot; where it is ignored it stays ignored."""
    before, after = (signal.default_int_handler, _leave)[:: 1 if now else -1]
    if signal.getsignal(signal.SIGINT) is before:
        signal.signal(signal.SIGINT, after)


def _before_libraries() -> None:
    _told_at_once(True)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """The console entry."""
    _before_libraries()
    from fasp_graph.cli import main as command_line

    _told_at_once(False)
    command_line()


if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] in ("fasp_graph", "-mfasp_graph"):
    _before_libraries()  # Python looks for the module to run: it imports the package before
