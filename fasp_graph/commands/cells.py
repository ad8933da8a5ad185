"""Tables: figures at the right, kept shares as a heat map, and cells that hold dotted names."""

from __future__ import annotations

import colorsys
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from passes.names import folded

from ..pages.shares import Shares, kept_shares, lightness


def figures_table(*heads: str, words: int = 1, title: str | None = None) -> Table:
    """A table whose columns behind the first `words` hold numbers."""
    result = Table(title=title)
    for number, heading in enumerate(heads):
        result.add_column(heading, justify="left" if number < words else "right")
    return result


def share_tables(groups: Iterable[Mapping[str, Any]], width: int) -> Iterator[Table]:
    """The kept share of each group, as in the report; as many columns in a table as fit."""
    shares = kept_shares(groups)
    alike: dict[tuple[int | None, ...], list[str]] = {}
    for row, held in shares.cells.items():
        alike.setdefault(tuple(map(held.get, shares.columns)), []).append(row)
    rows = {"\n".join(folded(names)): cells for cells, names in alike.items()}
    names = [line for name in rows for line in name.split("\n")]
    room = width - max(len("kept share of"), *map(len, names)) - 4 if names else width
    for start, stop in _runs(shares, room):
        result = Table("kept share of")
        for column in shares.columns[start:stop]:
            result.add_column(escape(column), justify="center")
        for name, cells in rows.items():
            if any(cell is not None for cell in cells[start:stop]):
                result.add_row(escape(name), *map(_share, cells[start:stop]))
        yield result


def _runs(shares: Shares, room: int) -> Iterator[tuple[int, int]]:
    """Which columns stand in one table."""
    start, used = 0, 0
    for number, column in enumerate(shares.columns):
        wide = max(len(column), 4) + 3
        if number > start and used + wide > room:
            yield start, number
            start, used = number, 0
        used += wide
    if shares.columns:
        yield start, len(shares.columns)


def _share(percent: int | None) -> Text:
    """A cell in the report's colours."""
    if percent is None:
        return Text()
    rgb = colorsys.hls_to_rgb(188 / 360, lightness(percent) / 100, 0.55)
    colour = "".join(f"{round(255 * part):02x}" for part in rgb)
    return Text(f"{percent}%", style=f"#06222b on #{colour}")


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
