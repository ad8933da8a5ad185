"""couple: labels -> groups of units that must be removed together.

unit       a connected component of labels
group      units with the same footprint: the same dims of the same weights in the same
multiplicity, summed away
           at the same places
blocks     runs of units inside a group (heads) that must each lose equally many, so that shapes
stay rectangular

chain      made by weights, summed away against weights: removing equals zeroing the consumer's
columns
bilinear   summed away between two activations (Q.K) or alone: exact, but nothing can be repaired
width      crosses an op that mixes it (normalisation): not exact
frozen     reaches an output, an input, an index, an unknown op: never removed; the reason is kept
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor
from torch.fx import Node

from .errors import FaspGraphError, module_of, user_line
from .labels import Labels, Site, Value


@dataclass(frozen=True)
class Member:
    """`indices[u]`: the positions along dim `dim` of `parameter` that unit u owns."""

    parameter: str
    dim: int
    indices: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Consumer:
    """A node that sums the group's axis away against dim `dim` of `parameter` ('' between
    activations).
    """

    node: str
    parameter: str
    dim: int
    module: str
    line: str = ""


@dataclass(frozen=True)
class Group:
    """Units with one footprint. `block_of[u]` numbers the block of unit u."""

    name: str
    kind: str
    symmetry: str
    size: int
    blocks: int
    members: tuple[Member, ...]
    consumers: tuple[Consumer, ...]
    reason: str
    block_of: tuple[int, ...] = ()
    components: tuple[int, ...] = field(default=(), repr=False)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able summary."""
        return {
            "name": self.name,
            "kind": self.kind,
            "symmetry": self.symmetry,
            "size": self.size,
            "blocks": self.blocks,
            "members": [
                {"parameter": m.parameter, "dim": m.dim, "per_unit": len(m.indices[0])}
                for m in self.members
            ],
            "consumers": [
                {
                    "node": c.node,
                    "parameter": c.parameter,
                    "dim": c.dim,
                    "module": c.module,
                    "line": c.line,
                }
                for c in self.consumers
            ],
            "reason": self.reason,
        }


@dataclass(frozen=True)
class DependencyGraph:
    """All groups of a model. `component[label]` numbers the unit of each label."""

    groups: tuple[Group, ...]
    parameters: dict[str, tuple[int, ...]]
    component: np.ndarray = field(repr=False, compare=False)
    labels: Labels = field(repr=False, compare=False)

    def __getitem__(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise FaspGraphError(
            f"no group named {name!r} · help: deps.groups lists {len(self.groups)} groups"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able: groups and parameter shapes."""
        return {
            "groups": [group.to_dict() for group in self.groups],
            "parameters": {name: list(shape) for name, shape in self.parameters.items()},
        }

    def to_networkx(self) -> nx.Graph:
        """Parameters are nodes; two are joined by an edge for each group that both are
        members of.
        """
        graph = nx.MultiGraph()
        for name, shape in self.parameters.items():
            graph.add_node(name, shape=str(list(shape)))
        for group in self.groups:
            names = sorted({member.parameter for member in group.members})
            for left, right in zip(names, names[1:], strict=False):
                graph.add_edge(left, right, key=group.name, group=group.name, kind=group.kind)
        return graph

    def explain(self, parameter: str) -> str:
        """For a weight: the groups of its dims, what goes with each index, why it is or is
        not prunable.
        """
        if parameter not in self.parameters:
            near = [name for name in self.parameters if parameter in name][:5]
            near = near or list(self.parameters)[:5]
            raise FaspGraphError(f"no parameter {parameter!r} · help: close names: {near}")
        lines = [f"{parameter} {list(self.parameters[parameter])}"]
        for group in self.groups:
            for member in group.members:
                if member.parameter == parameter:
                    lines += _explained(group, member)
        return "\n".join(lines)

    def listing(self) -> str:
        """One line per prunable group, short and stable: the golden form."""
        return "\n".join(
            f"{g.kind:8} {g.size:4} units {g.blocks:2} blocks {g.symmetry:11} "
            + " ".join(f"{m.parameter}[{m.dim}]x{len(m.indices[0])}" for m in g.members)
            + " -> "
            + " ".join(c.parameter or "activations" for c in g.consumers)
            for g in self.groups
            if g.kind != "frozen"
        )


def _explained(group: Group, member: Member) -> list[str]:
    others = [f"{m.parameter}[{m.dim}]" for m in group.members if m is not member]
    lines = [
        f"  dim {member.dim}: group {group.name} ({group.kind}, {group.size} units in "
        f"{group.blocks} blocks)",
        f"    goes with: {', '.join(others) or 'nothing else'}",
    ]
    for consumer in group.consumers:
        lines.append(
            f"    summed away at %{consumer.node} {consumer.module} {consumer.line}".rstrip()
        )
    if group.reason:
        lines.append(f"    reason: {group.reason}")
    return lines


def couple(labels: Labels, parameters: dict[str, Tensor]) -> DependencyGraph:
    """Connected components of the labels, grouped by footprint."""
    component = _components(labels)
    count = int(component.max()) + 1 if len(component) else 0
    notes = _Notes(labels, component, count)
    members = _memberships(labels, component)
    owned = np.zeros(count, bool)
    for units in members.values():
        owned[units] = True
    footprint = notes.footprint.copy()
    rng = np.random.default_rng(0)
    for source in sorted(members):
        key = rng.integers(1, 2**62, dtype=np.uint64)
        np.add.at(footprint, members[source], key)
    block = _blocks(labels, component, count)
    order = np.flatnonzero(owned)
    first = np.full(count, len(component))
    np.minimum.at(first, component, np.arange(len(component)))
    order = order[np.argsort(first[order], kind="stable")]
    buckets: dict[tuple[int, str], list[int]] = {}
    for unit in order:
        buckets.setdefault((int(footprint[unit]), notes.frozen.get(int(unit), "")), []).append(
            int(unit)
        )
    where_: dict[int, list[tuple[tuple[str, int], int]]] = {}
    for source, units in members.items():
        for index, unit in enumerate(units):
            where_.setdefault(int(unit), []).append((source, index))
    groups = [_group(units, where_, notes, block) for units in buckets.values()]
    return DependencyGraph(
        tuple(_named(groups)), {n: tuple(p.shape) for n, p in parameters.items()}, component, labels
    )


class _Notes:
    """Per unit: a hash of the places where it is summed, and why it is frozen, mixed or bent."""

    def __init__(self, labels: Labels, component: np.ndarray, count: int) -> None:
        self.footprint = np.zeros(count, np.uint64)
        self.sites: dict[int, list[Site]] = {}
        self.frozen: dict[int, str] = {}
        self.mixed: dict[int, str] = {}
        self.bent: set[int] = set()
        rng = np.random.default_rng(1)
        for site in labels.sites:
            key = rng.integers(1, 2**62, dtype=np.uint64)
            units = np.unique(np.concatenate([component[_flat(o.labels)] for o in site.operands]))
            self.footprint[units] += key
            for unit in units:
                self.sites.setdefault(int(unit), []).append(site)
        for mark in labels.marks:
            for unit in np.unique(component[_flat(mark.labels)]):
                if mark.kind == "bent":
                    self.bent.add(int(unit))
                else:
                    (self.frozen if mark.kind == "frozen" else self.mixed).setdefault(
                        int(unit), mark.reason
                    )


def _flat(array: Tensor) -> np.ndarray:
    return array.reshape(-1).numpy()


def _components(labels: Labels) -> np.ndarray:
    if not labels.edges:
        return np.arange(labels.count)
    pairs = torch.cat(labels.edges).numpy()
    graph = coo_array(
        (np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])),
        shape=(labels.count, labels.count),
    )
    return connected_components(graph, directed=False)[1]


def _memberships(labels: Labels, component: np.ndarray) -> dict[tuple[str, int], np.ndarray]:
    return {
        (s.name, s.dim): component[s.start : s.start + s.size]
        for s in labels.sources
        if s.kind == "parameter"
    }


def _blocks(labels: Labels, component: np.ndarray, count: int) -> np.ndarray:
    """A tag per unit; units with different tags stand in different blocks of some array."""
    tag = np.zeros(count, np.uint64)
    seen: set[bytes] = set()
    rows_seen: dict[bytes, np.uint64] = {}
    rng = np.random.default_rng(2)
    values = [leaf for v in labels.values.values() for leaf in (v if isinstance(v, list) else [v])]
    for value in values:
        if not isinstance(value, Value):
            continue
        for dim, array in value.arrays.items():
            if array.numel() == array.shape[dim]:
                continue
            units = component[array.movedim(dim, -1).reshape(-1, array.shape[dim]).numpy()]
            if units.tobytes() in seen:
                continue
            seen.add(units.tobytes())
            for row in units:
                row = np.unique(row)
                key = row.tobytes()
                if key not in rows_seen:
                    rows_seen[key] = rng.integers(1, 2**62, dtype=np.uint64)
                    tag[row] += rows_seen[key]
    return tag


def _group(
    units: list[int],
    where_: dict[int, list[tuple[tuple[str, int], int]]],
    notes: _Notes,
    block: np.ndarray,
) -> Group:
    gathered: dict[tuple[str, int], list[list[int]]] = {}
    for position, unit in enumerate(units):
        for source, index in where_[unit]:
            gathered.setdefault(source, [[] for _ in units])[position].append(index)
    members = tuple(
        Member(name, dim, tuple(tuple(rows) for rows in indices))
        for (name, dim), indices in gathered.items()
    )
    first = units[0]
    sites = notes.sites.get(first, [])
    consumers = tuple(_consumer(site, gathered) for site in sites)
    tags = block[units]
    _, block_of, sizes = np.unique(tags, return_inverse=True, return_counts=True)
    rank: dict[int, int] = {}
    for b in block_of:
        rank.setdefault(int(b), len(rank))
    kind, reason = _kind(first, notes, sites, sizes)
    symmetry = "permutation" if first in notes.bent or kind != "chain" else "invertible"
    return Group(
        "",
        kind,
        symmetry,
        len(units),
        len(sizes),
        members,
        consumers,
        reason,
        tuple(rank[int(b)] for b in block_of),
        tuple(units),
    )


def _kind(unit: int, notes: _Notes, sites: list[Site], sizes: np.ndarray) -> tuple[str, str]:
    if unit in notes.frozen:
        return "frozen", notes.frozen[unit]
    if not sites:
        return "frozen", notes.mixed.get(unit, "nothing consumes it")
    if len(set(sizes)) > 1:
        return "frozen", f"blocks of unequal size {sorted(set(sizes.tolist()))}"
    if unit in notes.mixed:
        return "width", notes.mixed[unit]
    weighed = all(len(s.operands) == 2 and len({o.data for o in s.operands}) == 2 for s in sites)
    return ("chain", "") if weighed else ("bilinear", "")


def _consumer(site: Site, members: dict[tuple[str, int], Any]) -> Consumer:
    parameter, dim = "", -1
    for operand in site.operands:
        if operand.node.op == "get_attr":
            parameter, dim = str(operand.node.target), operand.dim
    return Consumer(site.node.name, parameter, dim, module_of(site.node), user_line(site.node))


def _named(groups: list[Group]) -> list[Group]:
    used: dict[str, int] = {}
    result = []
    for group in groups:
        lead = group.members[0]
        base = re.sub(r"\.(weight|bias)$", "", lead.parameter)
        name = f"{base}.{lead.dim}"
        used[name] = used.get(name, 0) + 1
        if used[name] > 1:
            name = f"{name}.{used[name]}"
        result.append(Group(name, *[getattr(group, f) for f in _FIELDS]))
    return result


_FIELDS = tuple(f for f in Group.__dataclass_fields__ if f != "name")


def nodes_by_name(nodes: Any) -> dict[str, Node]:
    """The graph's nodes by name."""
    return {node.name: node for node in nodes}
