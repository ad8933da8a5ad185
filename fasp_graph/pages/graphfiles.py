"""The dependency graph as a file for other tools.

json      groups and shapes, as `DependencyGraph.to_dict`
dot       Graphviz          graphml   yEd, Gephi, networkx        mermaid   Markdown
svg       a picture: for each group the weights that make its axis, and right those that sum it
          away; layers that repeat are one

In dot, graphml and mermaid weights and groups are nodes. An edge goes from each weight that makes
a group's axis to the group, and from the group to each that sums it away: between activations, to
the op. Frozen groups and the residual stream are left out; json lists them with their reasons.
"""

from __future__ import annotations

import html
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from passes.errors import ConfigError
from passes.groups import DependencyGraph, Group
from passes.names import folded, pattern

from ..jsontext import to_json
from ..units import counted

if TYPE_CHECKING:
    import networkx as nx

COLOURS = {"chain": "#0b7285", "bilinear": "#8a3ffc", "head": "#c2570c", "width": "#a17a00"}
LETTER, ROW = 7.3, 20  # of the svg: how wide a letter is, and how high a line


def ends_of(group: Group) -> tuple[list[str], list[str]]:
    """The weights that make the group's axis, and the weights or ops that sum it away."""
    users = {(c.parameter, c.dim) for c in group.consumers}
    makers = {m.parameter for m in group.members if (m.parameter, m.dim) not in users}
    return sorted(makers), sorted({c.parameter or c.node for c in group.consumers})


def drawn(deps: DependencyGraph) -> list[Group]:
    """The groups that a picture shows."""
    return [group for group in deps.groups if group.kind not in ("frozen", "width")]


def flow_graph(deps: DependencyGraph) -> nx.DiGraph:
    """Makers -> groups -> consumers as a networkx graph whose attributes are plain text and
    numbers; the node of a group is `group:NAME`.
    """
    import networkx as nx

    graph = nx.DiGraph()
    for group in drawn(deps):
        makers, ends = ends_of(group)
        for name in (*makers, *ends):
            shape = " x ".join(map(str, deps.parameters.get(name, ())))
            graph.add_node(name, label=f"{name} {shape}".strip(), shape=shape, kind="")
        node, label = f"group:{group.name}", f"{group.kind} {group.size}"
        graph.add_node(node, label=label, shape="", kind=group.kind, units=group.size)
        graph.add_edges_from((maker, node) for maker in makers)
        graph.add_edges_from((node, end) for end in ends)
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
    lines = ["digraph coupled {", "  rankdir=LR; node [shape=box, fontname=monospace];"]
    for name, held in graph.nodes(data=True):
        kind = f', shape=ellipse, color="{COLOURS[held["kind"]]}"' if held["kind"] else ""
        lines.append(f"  {_quoted(name)} [label={_quoted(held['label'])}{kind}];")
    for left, right in graph.edges:
        colour = COLOURS[graph.nodes[left]["kind"] or graph.nodes[right]["kind"]]
        lines.append(f'  {_quoted(left)} -> {_quoted(right)} [color="{colour}"];')
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    inner = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{inner}"'


def _mermaid(deps: DependencyGraph) -> str:
    graph = flow_graph(deps)
    ids = {name: f"n{number}" for number, name in enumerate(graph)}
    lines = ["flowchart LR"]
    for name, held in graph.nodes(data=True):
        left, right = ("([", "])") if held["kind"] else ("[", "]")
        lines.append(f'  {ids[name]}{left}"{_entities(held["label"])}"{right}')
    lines += [f"  {ids[left]} --> {ids[right]}" for left, right in graph.edges]
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Mermaid reads `#NUMBER;` for characters that mean something to it."""
    return re.sub(r"[^\w .\-]", lambda match: f"#{ord(match[0])};", text)


def _svg(deps: DependencyGraph) -> str:
    """A section for each group: makers left, a band, those that sum the axis away right."""
    sections = _sections(deps)
    wide = [max((len(n) for held in sections for n in held[side]), default=0) for side in (2, 3)]
    start = 16 + LETTER * wide[0] + 8  # where the bands start, and where they end
    end = start + 110
    width = max(end + 8 + LETTER * wide[1], *(LETTER * len(held[1]) for held in sections), 0) + 16
    lines, top = [], 30
    for colour, title, makers, ends in sections:
        lines.append(
            f'<text x="16" y="{top}" fill="{colour}" font-weight="bold">{_xml(title)}</text>'
        )
        top += 10
        for x, names in ((16, makers), (end + 8, ends)):
            for row, name in enumerate(names):
                lines.append(f'<text x="{x:.0f}" y="{top + ROW * row + 14}">{_xml(name)}</text>')
        low, other, middle = top + ROW * len(makers), top + ROW * len(ends), (start + end) / 2
        lines.append(
            f'<path fill="{colour}" fill-opacity=".4" d="M{start:.0f} {top} C{middle:.0f} {top} '
            f"{middle:.0f} {top} {end:.0f} {top} V{other} C{middle:.0f} {other} {middle:.0f} {low} "
            f'{start:.0f} {low} Z"><title>{_xml(title)}</title></path>'
        )
        top = max(low, other) + 34
    size = f"{width:.0f} {top}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{width:.0f}" '
            f'height="{top}" font-family="monospace" font-size="12" role="img">',
            "<title>Coupled weights</title>",
            f'<rect width="{width:.0f}" height="{top}" fill="#fff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _sections(deps: DependencyGraph) -> list[tuple[str, str, list[str], list[str]]]:
    """(colour, title, makers, consumers) of groups; of layers that repeat all in one."""
    alike: dict[tuple[str, ...], list[Group]] = {}
    for group in drawn(deps):
        names = (pattern(name) for name in (group.name, *sum(ends_of(group), [])))
        alike.setdefault((group.kind, str(group.size), *names), []).append(group)
    found = []
    for (kind, size, *_), groups in alike.items():
        ends = [ends_of(group) for group in groups]
        left, right = (folded(n for held in ends for n in held[side]) for side in (0, 1))
        name = ", ".join(folded(group.name for group in groups))
        found.append((COLOURS[kind], f"{name}: {kind}, {counted(int(size), 'unit')}", left, right))
    return found


def _xml(text: str) -> str:
    return html.escape(_printable(text), quote=True)


FORMATS: dict[str, Callable[[DependencyGraph], str]] = {
    "json": _json,
    "dot": _dot,
    "graphml": _graphml,
    "mermaid": _mermaid,
    "svg": _svg,
}
