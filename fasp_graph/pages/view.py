"""The dependency graph as one HTML file: it needs no network and no server.

The drawing is Cytoscape.js with Dagre's layout (templates/vendor, MIT); the page's own code is
templates/graph-*.js. Module and parameter names are untrusted: they reach the page as JSON with
`<`, `>` and `&` escaped, the page shows them as text only, and its Content-Security-Policy runs
no script but those whose sha256 it lists.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from passes.groups import DependencyGraph, Group, Member
from passes.names import ranges

from ..jsontext import to_json
from .curves import stop_of

_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}
_SCRIPTS = (
    "vendor/cytoscape.min.js",
    "vendor/dagre.min.js",
    "graph-model.js",
    "graph-draw.js",
    "graph-panel.js",
    "graph-page.js",
)


def to_html(
    deps: DependencyGraph,
    path: str | os.PathLike[str],
    plan: Any = None,
    report: Any = None,
    name: str = "",
) -> Path:
    """Write the page; a plan and a report add what is kept and what it cost; `name`: the model's,
    for the title.
    """
    target = Path(path)
    target.write_text(page(deps, plan, report, name), encoding="utf-8")
    return target


def page(deps: DependencyGraph, plan: Any = None, report: Any = None, name: str = "") -> str:
    """The page as text."""
    data = to_json({**page_data(deps, plan, report), "name": name})
    for character, escape in _ESCAPES.items():
        data = data.replace(character, escape)
    return _shell().replace("__DATA__", data)


@dataclass(frozen=True)
class Picture:
    """The page for a notebook: the last value of a cell is drawn by `_repr_html_`."""

    html: str = field(repr=False)
    height: int = 640

    def _repr_html_(self) -> str:
        inner = html.escape(self.html, quote=True)
        return (
            '<iframe title="coupled weights" sandbox="allow-scripts" width="100%" '
            f'height="{self.height}" style="border:0" srcdoc="{inner}"></iframe>'
        )


def show(deps: DependencyGraph, plan: Any = None, report: Any = None, height: int = 640) -> Picture:
    """The page in a notebook: `fasp_graph.pages.view.show(deps)` as the last line of a cell."""
    return Picture(page(deps, plan, report), height)


@cache
def _shell() -> str:
    """The page without its data: style and scripts inlined, the scripts' hashes in the policy."""
    scripts = [_read(name) for name in _SCRIPTS]
    tags = "\n".join(f"<script>{text}</script>" for text in scripts)
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in scripts)
    found = _read("graph.html").replace("__STYLE__", _read("graph.css"))
    return found.replace("__SCRIPTS__", tags).replace("__HASHES__", hashes)


def _read(name: str) -> str:
    return resources.files(__package__).joinpath("templates").joinpath(name).read_text("utf-8")


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page_data(deps: DependencyGraph, plan: Any = None, report: Any = None) -> dict[str, Any]:
    """What the page shows: parameters by module in the order of use; groups with members,
    consumers, kept, reason; sizes before and after.
    """
    tied, uses = _tied(deps), _uses(deps)
    after, buffers = shapes_after(deps, plan), _buffers(deps)
    names = dict.fromkeys(
        [*deps.parameters, *deps.tied, *(m.parameter for g in deps.groups for m in g.members)]
    )
    place = {name: _place(name, tied, uses) for name in names}
    modules: dict[str, list[dict[str, Any]]] = {}
    for name in sorted(names, key=lambda name: (place[name] < 0, place[name])):
        module, _, leaf = name.rpartition(".")
        same = tied.get(name, [name])
        shape = list(next((deps.parameters[n] for n in same if n in deps.parameters), ()))
        shape = shape or buffers.get(name, [])
        small = next((after[n] for n in same if n in after), shape)
        entry: dict[str, Any] = {"name": name, "leaf": leaf, "shape": shape, "after": small}
        entry |= {"order": place[name], "counted": name in deps.parameters}
        modules.setdefault(module, []).append(entry)
    counted = [entry for held in modules.values() for entry in held if entry["counted"]]
    return {
        "modules": [{"name": name, "parameters": held} for name, held in modules.items()],
        "groups": [_group(group, plan, report, tied, uses) for group in deps.groups],
        "planned": plan is not None,
        "before": sum(_numel(entry["shape"]) for entry in counted),
        "after": sum(_numel(entry["after"]) for entry in counted),
    }


def _group(
    group: Group, plan: Any, report: Any, tied: dict[str, list[str]], uses: dict[str, list[int]]
) -> dict[str, Any]:
    entry = dict(group.to_dict())
    kept = plan.kept.get(group.name) if plan is not None else None
    entry["kept"], entry["planned"] = group.size if kept is None else len(kept), kept is not None
    entry["members"] = [
        {**shown, "parameter": name, "rows": ranges(member.indices), "unit": _unit(member)}
        for shown, member in zip(entry["members"], group.members, strict=True)
        for name in tied.get(member.parameter, [member.parameter])
    ]
    for consumer in entry["consumers"]:
        consumer["module"] = str(consumer["module"]).removeprefix("module ")
        consumer["order"] = uses.get(str(consumer["node"]), [-1])[0]
    for held in getattr(report, "groups", ()):
        if held.name == group.name:
            entry["figures"] = {
                key: value
                for key, value in vars(held).items()
                if isinstance(value, (int, float)) and key not in ("units", "kept", "blocks")
            }
            entry["curve"] = curve_points(held.curve, stop_of(vars(held)))
    return entry


def curve_points(curve: Sequence[float], stop: int, most: int = 48) -> list[list[float]]:
    """[k, predicted error of removing k units from each block] where the plan stopped, then at up
    to `most` even steps; empty for curves without errors.
    """
    errors = list(takewhile(math.isfinite, curve))
    last = len(errors) - 1
    if not any(error > 0 for error in errors):
        return []
    steps = [min(stop, last), *np.linspace(0, last, min(most, last + 1)).round().astype(int)]
    return [[int(k), float(f"{errors[k]:.4g}")] for k in steps]


def _unit(member: Member) -> str:
    """What the first unit owns, where that is more than one position."""
    return ranges(member.indices[0]) if len(member.indices[0]) > 1 else ""


def shapes_after(deps: DependencyGraph, plan: Any) -> dict[str, list[int]]:
    """Shapes of the parameters that a plan makes smaller."""
    shapes: dict[str, list[int]] = {}
    for group in deps.groups if plan is not None else ():
        kept = plan.kept.get(group.name)
        gone = group.size - len(kept or ())
        for member in group.members if kept is not None else ():
            if member.parameter not in deps.parameters:
                continue  # a buffer
            shape = shapes.setdefault(member.parameter, list(deps.parameters[member.parameter]))
            shape[member.dim] -= gone * len(member.indices[0])
    return shapes


def _uses(deps: DependencyGraph) -> dict[str, list[int]]:
    """Node and parameter names -> positions in the captured graph where they are used."""
    sites = deps.labels.sites
    found: dict[str, list[int]] = {}
    for number, node in enumerate(sites[0].node.graph.nodes if sites else ()):
        found.setdefault(node.name, []).append(number)
        for used in node.all_input_nodes:
            if used.op == "get_attr":
                found.setdefault(str(used.target), []).append(number)
    return found


def _module(deps: DependencyGraph) -> Any:
    """The captured graph's module, None where nothing is summed."""
    sites = deps.labels.sites
    return sites[0].node.graph.owning_module if sites else None


def _buffers(deps: DependencyGraph) -> dict[str, list[int]]:
    """Shapes of the buffers."""
    module = _module(deps)
    return {name: list(held.shape) for name, held in module.named_buffers()} if module else {}


def _tied(deps: DependencyGraph) -> dict[str, list[str]]:
    """Name -> all names of the same parameter, where there are several."""
    names: dict[str, list[str]] = {}
    for name, told in deps.tied.items():
        names.setdefault(told, []).append(name)
    return {name: names[told] for name, told in deps.tied.items()}


def _place(name: str, tied: dict[str, list[str]], uses: dict[str, list[int]]) -> int:
    """The position that the page shows `name` at: its first use, the last use for the last name
    of a tied parameter; -1 where it is never used.
    """
    held = tied.get(name, [name])
    known = sorted(number for other in held for number in uses.get(other, ()))
    if not known:
        return -1
    return known[-1] if len(held) > 1 and name == held[-1] else known[0]


def _numel(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
