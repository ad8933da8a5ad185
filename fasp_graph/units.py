"""Numbers as people read them: in units that fit, powers of 1000, and with a plural."""

from __future__ import annotations

from rich.filesize import pick_unit_and_suffix

_PREFIXES = ("", "k", "M", "G", "T", "P")


def counted(count: int, one: str, more: str = "") -> str:
    """`1 group`, `2 groups`; `more`: the plural, if it is not made with an s."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def in_bytes(value: float) -> str:
    """11020032 -> `11.0 MB`."""
    return _scaled(value, "B")


def in_flops(value: float) -> str:
    """3420000000 -> `3.4 GFLOPs`."""
    return _scaled(value, "FLOPs")


def _scaled(value: float, unit: str) -> str:
    size, suffix = pick_unit_and_suffix(int(value), [p + unit for p in _PREFIXES], 1000)
    return f"{value / size:,.{int(size > 1)}f} {suffix}"
