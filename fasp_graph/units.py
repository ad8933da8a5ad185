"""Large numbers in units that fit them, powers of 1000."""

from __future__ import annotations

from rich.filesize import pick_unit_and_suffix

_PREFIXES = ("", "k", "M", "G", "T", "P")


def in_bytes(value: float) -> str:
    """11020032 -> `11.0 MB`."""
    return _scaled(value, "B")


def in_flops(value: float) -> str:
    """3420000000 -> `3.4 GFLOPs`."""
    return _scaled(value, "FLOPs")


def _scaled(value: float, unit: str) -> str:
    size, suffix = pick_unit_and_suffix(int(value), [p + unit for p in _PREFIXES], 1000)
    return f"{value / size:,.{int(size > 1)}f} {suffix}"
