"""The dependency graph as one HTML file: it needs no network and no server.

Module and parameter names are untrusted: they reach the page as JSON with `<`, `>` and `&` escaped,
and the page shows them as text only.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from passes.couple import DependencyGraph

from .jsontext import to_json

_ESCAPES = {
    "<": "\\u003c",
    ">": "\\u003e",
    "&": "\\u0026",
    "\u2028": "\\u2028",
    "\u2029": "\\u2029",
}


def to_html(deps: DependencyGraph, path: str | os.PathLike[str], plan: Any = None) -> Path:
    """Write the page: modules with their parameters, groups as chips, and what a plan keeps."""
    template = resources.files(__package__).joinpath("templates/graph.html").read_text("utf-8")
    text = to_json(page_data(deps, plan))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    target = Path(path)
    target.write_text(template.replace("__DATA__", text), encoding="utf-8")
    return target


def page_data(deps: DependencyGraph, plan: Any = None) -> dict[str, Any]:
    """What the page shows: parameters by module; groups with members, consumers, kept, reason."""
    modules: dict[str, list[dict[str, Any]]] = {}
    for name, shape in deps.parameters.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, []).append({"name": name, "leaf": leaf, "shape": list(shape)})
    groups = []
    for group in deps.groups:
        entry = dict(group.to_dict())
        kept = plan.kept.get(group.name) if plan is not None else None
        entry["kept"] = group.size if kept is None else len(kept)
        groups.append(entry)
    return {
        "modules": [{"name": name, "parameters": held} for name, held in modules.items()],
        "groups": groups,
        "planned": plan is not None,
    }
