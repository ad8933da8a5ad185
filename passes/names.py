"""names: many names that differ by numbers only, told as one.

    layers.0.up, layers.1.up, layers.2.up   ->   layers.0-2.up (x3)
    layers.0.up, layers.7.up                ->   layers.*.up (x2)

A number is a whole part between dots: fc1 and fc2 are two names.
"""

from __future__ import annotations

from collections.abc import Iterable


def pattern(name: str) -> str:
    """The name with each number replaced."""
    return ".".join("#" if part.isdecimal() else part for part in name.split("."))


def folded(names: Iterable[str]) -> list[str]:
    """One text for each pattern, in the order of their first names."""
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        alike.setdefault(pattern(name), []).append(name)
    return [_told(held) if len(held) > 1 else held[0] for held in alike.values()]


def _told(names: list[str]) -> str:
    columns = zip(*(name.split(".") for name in names), strict=True)
    return f"{'.'.join(_part(set(column)) for column in columns)} (x{len(names)})"


def _part(values: set[str]) -> str:
    if len(values) == 1:
        return next(iter(values))
    numbers = sorted(map(int, values))
    whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{numbers[0]}-{numbers[-1]}" if whole else "*"
