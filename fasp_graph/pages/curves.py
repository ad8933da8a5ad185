"""Error curves: from left to right the predicted error of removing more and more units of a group,
log scale, all curves on the same, and where the plan stopped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WIDTH, HEIGHT = 200, 46
_NONE = "<p>None: the allocation was uniform.</p>"
_CAPTION = (
    "<p>Across: units removed from each block. Up: the error that the allocation predicts, on a "
    "logarithmic scale that all curves share. The dot is where the plan stopped.</p>"
)


def curves(groups: Iterable[Mapping[str, Any]]) -> str:
    """The curve of each group that has one, side by side."""
    held = [group for group in groups if len(group.get("curve") or ()) > 1]
    if not held:
        return _NONE
    errors = [value for group in held for value in group["curve"] if 0 < value < math.inf]
    least, most = min(errors, default=1.0), max(errors, default=1.0)
    low, high = math.log(least), math.log(most)

    def height(value: float) -> float:
        level = (math.log(max(value, least)) - low) / ((high - low) or 1)
        return round(HEIGHT - 42 * min(level, 1), 1)

    marks = f"<text x='-4' y='9'>{most:.2g}</text><text x='-4' y='{HEIGHT}'>{least:.2g}</text>"
    lines = [
        f"<figure><figcaption>{html.escape(str(group['name']))}</figcaption>"
        f"{_curve(group, height, marks)}</figure>"
        for group in held
    ]
    return f"{_CAPTION}<div class='curves'>{''.join(lines)}</div>"


def stop_of(group: Mapping[str, Any]) -> int:
    """How many units the plan removed from each block; the curve may end before (allocation
    standardised).
    """
    return int(min(len(group["curve"]) - 1, (group["units"] - group["kept"]) // group["blocks"]))


def _curve(group: Mapping[str, Any], height: Callable[[float], float], marks: str) -> str:
    curve, last = group["curve"], len(group["curve"]) - 1
    points = [(round(WIDTH * step / last, 1), height(value)) for step, value in enumerate(curve)]
    stop = points[stop_of(group)]
    line = " ".join(f"{x},{y}" for x, y in points)
    title = f"predicted error of {html.escape(str(group['name']), quote=True)} over removed units"
    return (
        f"<svg viewBox='-48 0 256 62' width='256' height='62' role='img' aria-label='{title}'>"
        f"<path d='M 0 2 V {HEIGHT + 2} H {WIDTH}' fill='none'/><g text-anchor='end'>{marks}</g>"
        f"<text x='0' y='60'>0</text><text x='{WIDTH}' y='60' text-anchor='end'>"
        f"{last} removed</text><polyline points='{line}'/>"
        f"<circle cx='{stop[0]}' cy='{stop[1]}' r='3'/></svg>"
    )
