"""Kept shares as a matrix: its rows are the modules that repeat, its columns what each of them
holds; a cell is the percentage of a group's units that stay.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shares:
    """`cells`: row -> column -> percent; a module that has no such part has no cell."""

    columns: tuple[str, ...]
    cells: dict[str, dict[str, int]]


def kept_shares(groups: Iterable[Mapping[str, Any]]) -> Shares:
    """Of the groups of a report; percents are rounded as the viewer does, halves up."""
    cells: dict[str, dict[str, int]] = {}
    for group in groups:
        row, column = split_name(group["name"])
        percent = math.floor(100 * group["kept"] / group["units"] + 0.5)
        cells.setdefault(row, {})[column] = percent
    return Shares(tuple(dict.fromkeys(c for row in cells.values() for c in row)), cells)


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.0` -> (`model.layers.3`, `mlp.up_proj`)."""
    base = re.sub(r"\.\d+(\.\d+)?$", "", name)
    match = re.match(r"(.*?\.\d+)\.(.+)", base)
    return (match[1], match[2]) if match else ("", base)


def lightness(percent: int) -> int:
    """Of a cell, in percent: dark where all is kept."""
    return round(92 - 0.42 * percent)
