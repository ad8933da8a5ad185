"""What `fasp-graph` starts: outside the package, whose libraries take seconds to load, so that an
interrupt meanwhile is told like any other.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The console entry."""
    try:
        from fasp_graph.cli import main as command_line
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    command_line()
