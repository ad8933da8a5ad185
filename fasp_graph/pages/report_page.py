"""report.html and report.json of a pruning run: what it cost, what it saved, what stayed and why.

The page is tables and pictures only: no script, no network. Its heat map is that of
fasp_graph/pages/shares.py.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from passes.names import folded, pattern

from ..jsontext import plain, to_json
from ..units import in_bytes
from .curves import curves
from .shares import kept_shares, lightness

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child, .names :is(th, td) { text-align: left; }
.map :is(th, td):not(:first-child) { text-align: center; }
.cell { color: #06222b; min-width: 4rem; border: 2px solid Canvas; }
.names td:first-child { white-space: nowrap; } .names td:last-child { overflow-wrap: anywhere; }
figure { margin: 0; } figcaption { overflow-wrap: anywhere; font-size: .85em; }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
svg text { font-size: 9px; fill: currentColor; } svg path { stroke: currentColor; opacity: .5; }
.scroll { overflow-x: auto; } polyline { fill: none; stroke: #0a7; stroke-width: 1.5; }
circle { fill: #c40; }
"""

_WAYS = (
    "Errors are relative squared errors of what the group's consumers put out. Emitted: native, "
    "the class's own code runs at the new size; attributes, sizes in its modules changed too; "
    "adapter, a gather or scatter joins old and new sizes; padded, weights are stored small and "
    "filled with zeros when read; graph, only the graph is smaller, not the class."
)
_TITLES = {
    "params": "parameters",
    "bytes": "memory of the weights",
    "flops": "FLOPs",
    "error_before": "error before repair",
    "error_after": "error after repair",
}


def write_report(
    folder: Path,
    name: str,
    report: Mapping[str, Any],
    figures: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
) -> None:
    """Write report.json and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {"model": name, "asked": asked or {}, **figures, **report}
    (folder / "report.json").write_text(to_json(found, indent=1) + "\n", encoding="utf-8")
    page = report_page(name, report, figures, asked)
    (folder / "report.html").write_text(page, encoding="utf-8")


def report_page(
    name: str,
    report: Mapping[str, Any],
    figures: Mapping[str, Any],
    asked: Mapping[str, Any] | None = None,
) -> str:
    """The page; `report`: Report.to_dict(), `figures`: name_before, name_after measured beside,
    `asked`: what the run was called with.
    """
    parts = [
        f"<h1>{_text(name)}, pruned</h1>",
        f"<p>{report['removed']:.1%} of all parameters removed, {report['sparsity']:.1%} of those "
        f"in scope; the compact model equals the dense one with the same units zeroed to "
        f"{report['verify_max_error']:.1e}.</p>",
        *(f"<p>{_text(note)}</p>" for note in report.get("notes", ())),
        "<h2>Before and after</h2>",
        _before_after({**report, **figures}),
        f"<p>FLOPs and latency are those of one call at {_text(report['inputs'])}; latency varies "
        "with what else the machine does: <code>fasp-graph bench</code> tells by how much.</p>",
        '<p>What goes together, to click on: <a href="graph.html">graph.html</a>.</p>',
        "<h2>Kept share of each group</h2>",
        _heat_map(report["groups"]),
        "<h2>Groups</h2>",
        f"<p>{_WAYS}</p>",
        _groups(report["groups"]),
        "<h2>Error curves</h2>",
        curves(report["groups"]),
        *_asked(asked or {}),
        "<h2>What it took</h2>",
        _table(("", ""), _cost(report)),
        "<h2>Seconds</h2>",
        _table(("stage", "seconds"), [(k, f"{v:.2f}") for k, v in report["seconds"].items()]),
        "<h2>Left alone, and why</h2>",
        _table(("group", "kind", "reason"), _left(report["frozen"]), "names"),
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
        name = key.removesuffix("_before")
        pair = (in_bytes(before), in_bytes(after)) if name == "bytes" else _pair(before, after)
        rows.append((_title(name), *pair, change))
    return _table(("", "before", "after", "change"), rows)


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _asked(asked: Mapping[str, Any]) -> list[str]:
    """What the run was called with; options that are None are not told."""
    rows = [(_title(name), _any(value)) for name, value in asked.items() if value is not None]
    return ["<h2>Asked for</h2>", _table(("option", "value"), rows, "names")] if rows else []


def _cost(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Memory, time and passes of the run; what was not measured is left out."""
    named = {"peak memory": "peak_memory", "peak GPU memory": "peak_memory_cuda"}
    rows = [(name, in_bytes(held)) for name, key in named.items() if (held := report[key])]
    rows.append(("forward passes over the calibration data", f"{report['forward_passes']:.3g}"))
    if steps := report["distances"]:
        said = " → ".join(f"{share:.3g}" for share in steps)
        rows.append(("distance from the dense outputs, step by step", said))
    return [*rows, ("seconds", f"{sum(report['seconds'].values()):.1f}")]


def _number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _figure(value: float) -> str:
    """A number in words; whole ones with all their digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _pair(*values: float) -> tuple[str, ...]:
    """Two that can be compared: both whole, or with all four digits: 5.050."""
    whole = all(isinstance(value, int) for value in values)
    return tuple(f"{value:,}" if whole else f"{value:#,.4g}" for value in values)


def _heat_map(groups: Iterable[Mapping[str, Any]]) -> str:
    shares = kept_shares(groups)
    lines = ["<tr><th></th>" + "".join(f"<th>{_text(c)}</th>" for c in shares.columns) + "</tr>"]
    for row, held in shares.cells.items():
        cells = "".join(_cell(held.get(column)) for column in shares.columns)
        lines.append(f"<tr><th scope='row'>{_text(row)}</th>{cells}</tr>")
    return f"<div class='scroll'><table class='map'>{''.join(lines)}</table></div>"


def _cell(percent: int | None) -> str:
    if percent is None:
        return "<td></td>"
    style = f"background:hsl(188 55% {lightness(percent)}%)"
    return f"<td class='cell' style='{style}'>{percent}%</td>"


def _groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """What the report tells of the groups, in the order of its fields, but for the curves."""
    rows = [{key: value for key, value in group.items() if key != "curve"} for group in groups]
    heads = tuple(rows[0]) if rows else ("name",)
    heads = tuple(head for head in heads if any(_any(row.get(head)) for row in rows))
    shown = [tuple(_any(row.get(head)) for head in heads) for row in rows]
    return _table(tuple(map(_title, heads)), shown)


def _left(frozen: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """A row for each kind and reason; of layers that repeat the first one's."""
    alike: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for held in frozen:
        key = (pattern(held["name"]), held["kind"], re.sub(r"_?\d+", "", held["reason"]))
        alike.setdefault(key, []).append(held)
    return [
        (", ".join(folded(held["name"] for held in group)), group[0]["kind"], group[0]["reason"])
        for group in alike.values()
    ]


def _any(value: Any) -> str:
    value = plain(value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {held}" for name, held in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else _figure(value) if _number(value) else str(value)


def _table(heads: tuple[str, ...], rows: Iterable[tuple[str, ...]], style: str = "") -> str:
    top = "".join(f"<th>{_text(head)}</th>" for head in heads)
    body = "".join(
        "<tr>" + "".join(f"<td>{_text(value)}</td>" for value in row) + "</tr>" for row in rows
    )
    return f"<div class='scroll'><table class='{style}'><tr>{top}</tr>{body}</table></div>"


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)
