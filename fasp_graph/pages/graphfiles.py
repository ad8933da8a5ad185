"""The dependency graph as a file for other tools.

json      groups and shapes, as `DependencyGraph.to_dict`
dot       Graphviz          graphml   yEd, Gephi, networkx        mermaid   Markdown
svg       a picture, laid out by networkx by layers

Nodes are parameters; an edge goes from each weight that makes a group's axis to each that sums
it away. Frozen groups are no edges; in json they are listed with their reasons.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import ConfigError
from passes.groups import DependencyGraph

from ..jsontext import to_json

if TYPE_CHECKING:
    import networkx as nx

COLOURS = {"chain": "#0b7285", "bilinear": "#8a3ffc", "head": "#c2570c", "width": "#a17a00"}


def flow_graph(deps: DependencyGraph) -> nx.DiGraph:
    """Producers -> consumers as a networkx graph whose attributes are plain text and numbers."""
    import networkx as nx

    graph = nx.DiGraph()
    for group in deps.groups:
        if group.kind in ("frozen", "width"):
            continue
        users = {(c.parameter, c.dim) for c in group.consumers}
        ends = sorted({c.parameter or c.node for c in group.consumers})
        makers = sorted({m.parameter for m in group.members if (m.parameter, m.dim) not in users})
        for name in (*makers, *ends):
            shape = deps.parameters.get(name)
            graph.add_node(name, shape="" if shape is None else " x ".join(map(str, shape)))
        for maker in makers:
            for end in ends:
                graph.add_edge(maker, end, group=group.name, kind=group.kind, units=group.size)
    return graph


def write(deps: DependencyGraph, form: str, path: str | os.PathLike[str]) -> Path:
    """Write the graph as `form`, one of FORMATS."""
    target = Path(path)
    target.write_text(text(deps, form), encoding="utf-8")
    return target


def text(deps: DependencyGraph, form: str) -> str:
    """The graph in a format of FORMATS."""
    if form not in FORMATS:
        raise ConfigError(f"no format {form!r} · help: one of {', '.join(FORMATS)}")
    return FORMATS[form](deps)


def _json(deps: DependencyGraph) -> str:
    return to_json(deps.to_dict(), indent=1) + "\n"


def _graphml(deps: DependencyGraph) -> str:
    import networkx as nx

    graph = flow_graph(deps)
    clean = nx.relabel_nodes(graph, {name: _printable(name) for name in graph})
    return "\n".join(nx.generate_graphml(clean, named_key_ids=True)) + "\n"


def _printable(name: str) -> str:
    """XML has no place for control characters."""
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "?", name)


def _dot(deps: DependencyGraph) -> str:
    graph = flow_graph(deps)
    lines = ["digraph coupled {", "  rankdir=TB; node [shape=box, fontname=monospace];"]
    for name, shape in graph.nodes(data="shape"):
        lines.append(f"  {_quoted(name)} [label={_quoted(f'{name} {shape}'.strip())}];")
    for left, right, held in graph.edges(data=True):
        label = _quoted(f"{held['kind']} {held['units']}")
        colour = COLOURS[held["kind"]]
        ends = f"{_quoted(left)} -> {_quoted(right)}"
        lines.append(f'  {ends} [label={label}, color="{colour}"];')
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{inner}"'


def _mermaid(deps: DependencyGraph) -> str:
    graph = flow_graph(deps)
    ids = {name: f"n{number}" for number, name in enumerate(graph)}
    lines = ["flowchart TD"]
    for name, shape in graph.nodes(data="shape"):
        lines.append(f'  {ids[name]}["{_entities(f"{name} {shape}".strip())}"]')
    for left, right, held in graph.edges(data=True):
        lines.append(f"  {ids[left]} -->|{held['kind']} {held['units']}| {ids[right]}")
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Mermaid reads `#NUMBER;` for characters that mean something to it."""
    return re.sub(r"[^\w .\-]", lambda match: f"#{ord(match[0])};", text)


def _svg(deps: DependencyGraph) -> str:
    """Each connected part is a row: makers left, those that sum away right."""
    graph = flow_graph(deps)
    places = _layout(graph)
    width = 80 + max((x + 7.2 * len(name) for name, (x, _) in places.items()), default=0)
    height = 50 + max((y for _, y in places.values()), default=0)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="monospace" font-size="12" role="img">',
        "<title>Coupled weights</title>",
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#fff"/>',
    ]
    for left, right, held in graph.edges(data=True):
        (x, y), (u, v) = places[left], places[right]
        lines.append(
            f'<line x1="{x + 7.2 * len(left) + 16:.0f}" y1="{y - 4:.0f}" x2="{u - 8:.0f}" '
            f'y2="{v - 4:.0f}" stroke="{COLOURS[held["kind"]]}" stroke-width="2">'
            f"<title>{_xml(held['group'])}</title></line>"
        )
    for name, (x, y) in places.items():
        lines.append(f'<text x="{x:.0f}" y="{y:.0f}">{_xml(name)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _xml(text: str) -> str:
    return html.escape(_printable(text), quote=True)


def _layout(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Columns by the condensed graph's generations (cycles count as one), parts below another."""
    import networkx as nx

    found: dict[str, tuple[float, float]] = {}
    top = 30.0
    for part in nx.weakly_connected_components(graph):
        ordered = nx.condensation(graph.subgraph(sorted(part)))
        left, bottom = 16.0, top
        for generation in nx.topological_generations(ordered):
            names = sorted(name for at in generation for name in ordered.nodes[at]["members"])
            for row, name in enumerate(names):
                found[name] = (left, top + 22 * row)
            left += 7.2 * max(map(len, names)) + 90
            bottom = max(bottom, top + 22 * len(names))
        top = bottom + 14
    return found


FORMATS: dict[str, Callable[[DependencyGraph], str]] = {
    "json": _json,
    "dot": _dot,
    "graphml": _graphml,
    "mermaid": _mermaid,
    "svg": _svg,
}
