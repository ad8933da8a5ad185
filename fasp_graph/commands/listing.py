"""The table of `inspect`: one row for the groups of layers that repeat."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from rich.markup import escape
from rich.table import Table

from passes.groups import KINDS, Consumer, DependencyGraph, Group
from passes.names import folded, pattern

from .cells import Names

WIDE = 90  # columns of a terminal that shows all headings side by side
HEADS = ("group", "kind", "units", "blocks", "members", "consumers", "reason")


def groups_table(title: str, deps: DependencyGraph, frozen: bool, width: int = WIDE) -> Table:
    """The prunable groups, and the frozen ones if asked; names as in passes/names.py. On a narrow
    terminal what a row holds stands below each other.
    """
    result = Table(title=escape(title), title_justify="left", show_lines=True)
    alike: dict[Hashable, list[Group]] = {}
    for group in sorted(deps.groups, key=lambda group: KINDS.index(group.kind)):
        if group.kind != "frozen" or frozen:
            alike.setdefault(_form(group), []).append(group)
    rows = [_cells(held) for held in alike.values()]
    heads = HEADS if any(row[-1] for row in rows) else HEADS[:-1]
    if width < WIDE:
        return _turned(result, rows)
    for heading in heads:
        result.add_column(heading)
    for row in rows:
        result.add_row(*map(Names, row[: len(heads)]))
    return result


def _turned(result: Table, rows: list[tuple[str, ...]]) -> Table:
    """Each row as a section of lines `heading | cell`."""
    result.show_header = result.show_lines = False
    result.add_column(no_wrap=True)
    result.add_column()
    for row in rows:
        for heading, cell in zip(HEADS, row, strict=True):
            if cell:
                result.add_row(heading, Names(cell))
        result.add_section()
    return result


def _form(group: Group) -> Hashable:
    """What the groups of one row have in common."""
    members = frozenset((pattern(m.parameter), m.dim) for m in group.members)
    consumers = frozenset(pattern(_where(c)) for c in group.consumers)
    reason = re.sub(r"_?\d+", "", group.reason)
    return pattern(group.name), group.kind, group.size, group.blocks, members, consumers, reason


def _cells(groups: list[Group]) -> tuple[str, ...]:
    first = groups[0]
    members = _sorted(m.parameter for group in groups for m in group.members)
    consumers = _sorted(_where(c) for group in groups for c in group.consumers)
    return (
        "\n".join(folded(_sorted(group.name for group in groups))),
        *(first.kind, str(first.size), str(first.blocks)),
        *("\n".join(folded(names)) for names in (members, consumers)),
        first.reason,
    )


def _where(consumer: Consumer) -> str:
    """The weight; between activations the module."""
    return consumer.parameter or consumer.module or consumer.node


def _sorted(names: Iterable[str]) -> list[str]:
    """By the numbers' value: layer 2 before layer 10."""
    return sorted(set(names), key=lambda name: [p.zfill(9) for p in re.split(r"(\d+)", name)])
