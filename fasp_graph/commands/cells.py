"""Tables: figures at the right, and cells that hold dotted names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


def figures_table(*heads: str, words: int = 1, title: str | None = None) -> Table:
    """A table whose columns behind the first `words` hold numbers."""
    result = Table(title=title)
    for number, heading in enumerate(heads):
        result.add_column(heading, justify="left" if number < words else "right")
    return result


@dataclass(frozen=True)
class Names:
    """Lines that go on before a dot or behind a space where the column is too narrow for them, so
    that no part of a name is broken.
    """

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        lines = self.text.splitlines() or [""]
        least = max(len(part) for line in lines for part in _parts(line))
        return Measurement(least, max(map(len, lines))).with_maximum(options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line in self.text.splitlines():
            yield from (Text(piece, overflow="fold") for piece in broken(line, options.max_width))


def broken(line: str, width: int) -> list[str]:
    """`line` in pieces of at most `width`, as far as its dots and spaces allow."""
    pieces = [""]
    for part in _parts(line):
        if pieces[-1] and len(pieces[-1] + part) > width:
            pieces.append(part.lstrip())
        else:
            pieces[-1] += part
    return pieces


def _parts(line: str) -> list[str]:
    """What follows each other: `layers`, `.{0..11}`, `.up`; braces stay whole."""
    return re.findall(r"[. ]?(?:\{[^{}]*\}|[^. ])+|[. ]", line) or [""]
