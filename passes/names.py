"""names: many names that differ by numbers only, told as one, as a shell would spell them.

    layers.0.up, layers.1.up, layers.2.up   ->   layers.{0..2}.up
    layers.0.up, layers.7.up                ->   layers.{0,7}.up

A number is a whole part between dots: fc1 and fc2 are two names. Positions are told as `0-63, 96`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

RUNS = 6  # in one pair of braces, at most


def pattern(name: str) -> str:
    """The name with each number replaced."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def folded(names: Iterable[str]) -> list[str]:
    """As few texts as tell exactly these names, in the order of the patterns' first names."""
    alike: dict[str, list[tuple[str, ...]]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(pattern(name), []).append(tuple(name.split(".")))
    return [".".join(parts) for rows in alike.values() for parts in _told(rows)]


def _told(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """First parts that the same rests follow are one."""
    if not rows[0]:
        return [()]
    rests: dict[str, list[tuple[str, ...]]] = {}
    for first, *rest in rows:
        rests.setdefault(first, []).append(tuple(rest))
    firsts: dict[frozenset[tuple[str, ...]], list[str]] = {}
    for first, held in rests.items():
        firsts.setdefault(frozenset(held), []).append(first)
    return [(_part(held), *rest) for held in firsts.values() for rest in _told(rests[held[0]])]


def _part(values: list[str]) -> str:
    if len(values) == 1:
        return values[0]
    runs: list[list[int]] = []
    for number in sorted(map(int, values)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if len(texts) > RUNS:
        texts[RUNS - 2 : -1] = ["…"]
    return f"{{{','.join(texts)}}}"


def ranges(positions: np.ndarray) -> str:
    """Each position once: `0-63, 96`."""
    found = np.unique(positions)
    if not len(found):
        return ""
    starts = np.flatnonzero(np.diff(found, prepend=found[0] - 2) != 1)
    ends = np.append(starts[1:], len(found)) - 1
    pairs = [(int(found[a]), int(found[b])) for a, b in zip(starts, ends, strict=True)]
    texts = [str(low) if low == high else f"{low}-{high}" for low, high in pairs[:RUNS]]
    return ", ".join(texts) + (f" and {len(pairs) - RUNS} more" if len(pairs) > RUNS else "")
