"""Groups and the dependency graph as values: what must be removed together, and why.

unit       indices of weights that go together
group      units with the same footprint: the same dims of the same weights in the same
           multiplicity, summed away at the same places
blocks     runs of units inside a group (heads) that must each lose equally many, so that shapes
           stay rectangular

chain      made by weights, summed away against weights: removing equals zeroing the consumer's
           columns; restorable
bilinear   summed away between two activations (Q.K): exact, but nothing can be repaired
head       whole blocks: heads, KV groups with their queries, experts: exact
width      crosses an op that mixes it (normalisation): the rest is another function
frozen     reaches an output, an input, an index, an unknown op: never removed; the reason is kept
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import FaspGraphError
from .names import folded, pattern, ranges
from .values import Labels
from .ways_out import way_out

if TYPE_CHECKING:
    import networkx as nx

KINDS = ("chain", "bilinear", "head", "width", "frozen")


@dataclass(frozen=True)
class Member:
    """`indices[u]`: the positions along dim `dim` of `parameter` that unit u owns [units, k]."""

    parameter: str
    dim: int
    indices: np.ndarray = field(repr=False, compare=False)


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
    """Units with one footprint. `block_of[u]` numbers the block of unit u; `layer` is the run of
    propagation that found it (0: inside blocks, 1: blocks), `components[u]` its unit there. At
    least `least` units must stay (as many as a router chooses), and one of each of the `pieces`
    (passes/pieces.py). `means`: where a mean over the axis counts what is gone as zeros.
    """

    name: str
    kind: str
    symmetry: str
    size: int
    blocks: int
    members: tuple[Member, ...]
    consumers: tuple[Consumer, ...]
    reason: str
    layer: int = 0
    least: int = 1
    block_of: np.ndarray = field(
        default_factory=lambda: np.zeros(0, int), repr=False, compare=False
    )
    components: np.ndarray = field(
        default_factory=lambda: np.zeros(0, int), repr=False, compare=False
    )
    pieces: tuple[np.ndarray, ...] = field(default=(), repr=False, compare=False)
    means: tuple[Consumer, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able summary."""
        return {
            "name": self.name,
            "kind": self.kind,
            "symmetry": self.symmetry,
            "size": self.size,
            "blocks": self.blocks,
            "members": [
                {"parameter": m.parameter, "dim": m.dim, "per_unit": m.indices.shape[1]}
                for m in self.members
            ],
            "consumers": [dict(vars(consumer)) for consumer in self.consumers],
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Layer:
    """One run of propagation: its labels, and the unit (connected component) of each label."""

    labels: Labels
    component: np.ndarray


@dataclass(frozen=True)
class DependencyGraph:
    """All groups of a model, with the labels that they were read off. A tied weight is told by one
    of its names; `tied`: each of them -> that one.
    """

    groups: tuple[Group, ...]
    parameters: dict[str, tuple[int, ...]]
    layers: tuple[Layer, ...] = field(repr=False, compare=False)
    tied: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> Labels:
        """The labels of the first run."""
        return self.layers[0].labels

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

    def to_networkx(self) -> nx.MultiGraph:
        """Parameters are nodes; two are joined by an edge for each group that both are
        members of.
        """
        import networkx as nx

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
        not prunable. Layers that repeat are told as one (passes/names.py).
        """
        parameter = self.tied.get(parameter, parameter)
        if parameter not in self.parameters:
            near = [name for name in self.parameters if parameter in name]
            near += difflib.get_close_matches(parameter, self.parameters, 5)
            names = ", ".join(list(dict.fromkeys(near or self.parameters))[:5])
            raise FaspGraphError(f"no parameter {parameter!r} · help: close names: {names}")
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
            + " ".join(f"{m.parameter}[{m.dim}]x{m.indices.shape[1]}" for m in g.members)
            + " -> "
            + " ".join(c.parameter or "activations" for c in g.consumers)
            for g in self.groups
            if g.kind != "frozen"
        )


def _explained(group: Group, member: Member) -> list[str]:
    counts = ((group.size, "unit"), (group.blocks, "block"))
    units, blocks = (f"{count} {what}{'s' * (count != 1)}" for count, what in counts)
    lines = [f"  dim {member.dim}: group {group.name} ({group.kind}, {units} in {blocks})"]
    others = folded(
        f"{m.parameter}[{m.dim}] {ranges(m.indices[0])}" for m in group.members if m is not member
    )
    first = f"    index {ranges(member.indices[0])} goes with: "
    lines += [first + (others or ["nothing else"])[0], *(" " * len(first) + o for o in others[1:])]
    alike: dict[tuple[str, str], list[Consumer]] = {}
    for consumer in group.consumers:
        alike.setdefault((pattern(consumer.module), consumer.line), []).append(consumer)
    for (_, line), held in alike.items():
        modules = ", ".join(folded(consumer.module for consumer in held))
        lines.append(f"    summed away at %{held[0].node} {modules} {line}".rstrip())
    for mean in group.means:
        lines.append(f"    under a mean at %{mean.node} {mean.module} {mean.line}".rstrip())
    if group.reason:
        lines.append(f"    reason: {group.reason}")
        lines += [f"    {told}" for told in [way_out(group.kind, group.reason)] if told]
    return lines
