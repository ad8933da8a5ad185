"""plots: bars and log-log lines as SVG, written by hand, so that a benchmark needs no library."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, ROW, LEFT = 760, 22, 300
HEIGHT, MARGIN = 420, 60
COLOURS = ("#2563eb", "#dc2626", "#059669", "#9333ea")


def bars(
    path: Path, title: str, labels: Sequence[str], values: Sequence[float], mark: float | None
) -> None:
    """Horizontal bars with their values; a line at `mark`."""
    top = max([*values, mark or 0.0])
    scale = (WIDTH - LEFT - 60) / top
    parts = [_text(10, 20, title, 14)]
    for number, (label, value) in enumerate(zip(labels, values, strict=True)):
        y = 36 + ROW * number
        parts.append(_text(LEFT - 8, y + 13, label, 12, "end"))
        size = f'width="{value * scale:.1f}" height="{ROW - 6}"'
        parts.append(f'<rect x="{LEFT}" y="{y}" {size} fill="{COLOURS[0]}"/>')
        parts.append(_text(LEFT + value * scale + 4, y + 13, f"{value:.2f}", 11))
    bottom = 36 + ROW * len(labels)
    if mark is not None:
        x = LEFT + mark * scale
        parts.append(_line([(x, 30), (x, bottom)], COLOURS[1]))
    _write(path, bottom + 14, parts)


def lines(
    path: Path,
    title: str,
    x_name: str,
    y_name: str,
    series: Mapping[str, Sequence[Sequence[float]]],
) -> None:
    """Points (x, y), joined, on logarithmic axes."""
    points = [point for held in series.values() for point in held]
    (low, high), (under, over) = (
        (math.log(min(p[k] for p in points)), math.log(max(p[k] for p in points))) for k in (0, 1)
    )

    def at(point: Sequence[float]) -> tuple[float, float]:
        across = (math.log(point[0]) - low) / ((high - low) or 1)
        up = (math.log(point[1]) - under) / ((over - under) or 1)
        return (
            MARGIN + across * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - up * (HEIGHT - 2 * MARGIN),
        )

    parts = [_text(10, 20, title, 14), _text(WIDTH / 2, HEIGHT - 12, x_name, 12)]
    parts.append(_text(10, 40, y_name, 12))
    for number, (name, held) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(_line([at(point) for point in held], colour))
        parts += [
            _text(at(p)[0], at(p)[1] - 6, f"{p[0]:g}: {p[1]:.3g}", 10, "middle") for p in held
        ]
        parts.append(_text(WIDTH - 12, 20 + 16 * number, name, 12, "end", colour))
    _write(path, HEIGHT, parts)


def _text(x: float, y: float, text: str, size: int, at: str = "start", fill: str = "#111") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{at}" fill="{fill}"'
    return f"<text {place}>{html.escape(text)}</text>"


def _line(points: Sequence[tuple[float, float]], colour: str) -> str:
    joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>'


def _write(path: Path, height: float, parts: Sequence[str]) -> None:
    size = f'width="{WIDTH}" height="{height:.0f}" viewBox="0 0 {WIDTH} {height:.0f}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
    ground = '<rect width="100%" height="100%" fill="#fff"/>'
    path.write_text("\n".join([head, ground, *parts, "</svg>"]) + "\n", encoding="utf-8")
