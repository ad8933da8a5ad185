"""report.html and report.json of a pruning run: what it cost, what it saved, what stayed and why.

The page is tables and pictures only: no script, no network. The heat map's rows are the modules
that repeat, its columns what each of them holds; a cell is the kept share of a group's units. An
error curve shows, from left to right, the predicted error of removing more and more units of a
group (log scale, all curves on the same), and where the plan stopped.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ..jsontext import plain, to_json

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
.cell { color: #06222b; min-width: 4rem; text-align: center; border: 2px solid Canvas; }
.names td { text-align: left; overflow-wrap: anywhere; } .dim { opacity: .7; }
.scroll { overflow-x: auto; } polyline { fill: none; stroke: #0a7; stroke-width: 1.5; }
circle { fill: #c40; }
"""


def write_report(
    folder: Path, name: str, report: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write report.json and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model": name, **figures, **report}
    (folder / "report.json").write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    (folder / "report.html").write_text(report_page(name, report, figures), encoding="utf-8")


def report_page(name: str, report: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """The page; `report`: Report.to_dict(), `figures`: name_before, name_after measured beside."""
    parts = [
        f"<h1>{_text(name)}, pruned</h1>",
        f"<p>{report['removed']:.1%} of all parameters removed, {report['sparsity']:.1%} of those "
        f"in scope; the compact model equals the dense one with the same units zeroed to "
        f"{report['verify_max_error']:.1e}.</p>",
        *(f"<p>{_text(note)}</p>" for note in report.get("notes", ())),
        "<h2>Before and after</h2>",
        _before_after({**report, **figures}),
        f"<p>FLOPs and latency are those of one call at {_text(report['inputs'])}.</p>",
        "<h2>Kept share of each group</h2>",
        _heat_map(report["groups"]),
        "<h2>Groups</h2>",
        _groups(report["groups"]),
        "<h2>Error curves</h2>",
        _curves(report["groups"]),
        "<h2>What it took</h2>",
        _table(("", ""), _cost(report)),
        "<h2>Seconds</h2>",
        _table(("stage", "seconds"), [(k, f"{v:.2f}") for k, v in report["seconds"].items()]),
        "<h2>Left alone, and why</h2>",
        _table(("group", "kind", "reason"), [_left(held) for held in report["frozen"]], "names"),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(name)}, pruned</title><style>{_STYLE}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _before_after(figures: Mapping[str, Any]) -> str:
    """A row for each pair name_before, name_after."""
    rows = []
    for key, before in figures.items():
        after = figures.get(key.removesuffix("_before") + "_after")
        if not key.endswith("_before") or not _number(before) or not _number(after):
            continue
        change = f"{after / before - 1:+.1%}" if before else ""
        title = key.removesuffix("_before").replace("_", " ")
        rows.append((title, _figure(before), _figure(after), change))
    return _table(("", "before", "after", "change"), rows)


def _cost(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Memory, time and passes of the run; what was not measured is left out."""
    named = {"peak memory": "peak_memory", "peak GPU memory": "peak_memory_cuda"}
    rows = [(name, f"{held / 1e6:,.0f} MB") for name, key in named.items() if (held := report[key])]
    rows.append(("forward passes over the calibration data", f"{report['forward_passes']:g}"))
    return [*rows, ("seconds", f"{sum(report['seconds'].values()):.1f}")]


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _heat_map(groups: Iterable[Mapping[str, Any]]) -> str:
    """Rows by the part of a name up to its first number, columns by the rest."""
    cells: dict[str, dict[str, float]] = {}
    for group in groups:
        row, column = split_name(group["name"])
        cells.setdefault(row, {})[column] = group["kept"] / group["units"]
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    lines = ["<tr><th></th>" + "".join(f"<th>{_text(c)}</th>" for c in columns) + "</tr>"]
    for row, held in cells.items():
        shares = "".join(_cell(held.get(column)) for column in columns)
        lines.append(f"<tr><th scope='row'>{_text(row)}</th>{shares}</tr>")
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def split_name(name: str) -> tuple[str, str]:
    """`model.layers.3.mlp.up_proj.0` -> (`model.layers.3`, `mlp.up_proj`)."""
    base = re.sub(r"\.\d+(\.\d+)?$", "", name)
    match = re.match(r"(.*?\.\d+)\.(.+)", base)
    return (match[1], match[2]) if match else ("", base)


def _cell(share: float | None) -> str:
    if share is None:
        return "<td></td>"
    lightness = 92 - 42 * share  # dark: all kept
    return f"<td class='cell' style='background:hsl(188 55% {lightness:.0f}%)'>{share:.0%}</td>"


def _groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """All that the report tells of each group, in the order of its fields, but for its curve."""
    rows = [{key: value for key, value in group.items() if key != "curve"} for group in groups]
    heads = tuple(rows[0]) if rows else ("name",)
    shown = [tuple(_any(row.get(head)) for head in heads) for row in rows]
    return _table(tuple(head.replace("_", " ") for head in heads), shown)


def _curves(groups: Iterable[Mapping[str, Any]]) -> str:
    """An error curve for each group that has one."""
    held = [group for group in groups if len(group.get("curve") or ()) > 1]
    if not held:
        return "<p>None: the allocation was uniform.</p>"
    errors = [value for group in held for value in group["curve"] if 0 < value < math.inf]
    low, high = math.log(min(errors, default=1)), math.log(max(errors, default=1))

    def height(value: float) -> float:
        level = (math.log(max(value, math.exp(low))) - low) / ((high - low) or 1)
        return round(46 - 42 * min(level, 1), 1)

    lines = [
        f"<tr><th scope='row'>{_text(group['name'])}</th><td>{_curve(group, height)}</td></tr>"
        for group in held
    ]
    return f"<div class='scroll'><table>{''.join(lines)}</table></div>"


def _curve(group: Mapping[str, Any], height: Callable[[float], float]) -> str:
    """Error over removed units; the dot is where the plan stopped."""
    curve, last = group["curve"], len(group["curve"]) - 1
    points = [(round(200 * step / last, 1), height(value)) for step, value in enumerate(curve)]
    stop = points[round((1 - group["kept"] / group["units"]) * last)]
    line = " ".join(f"{x},{y}" for x, y in points)
    title = f"predicted error of {_text(group['name'])} over removed units"
    return (
        f"<svg viewBox='-4 0 208 50' width='208' height='50' role='img' aria-label='{title}'>"
        f"<polyline points='{line}'/><circle cx='{stop[0]}' cy='{stop[1]}' r='3'/></svg>"
    )


def _left(held: Mapping[str, Any]) -> tuple[str, str, str]:
    return held["name"], held["kind"], held["reason"]


def _any(value: Any) -> str:
    value = plain(value)
    return "" if value is None else _figure(value) if _number(value) else str(value)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], style: str = "") -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table class='{style}'><tr>{top}</tr>{body}</table></div>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
