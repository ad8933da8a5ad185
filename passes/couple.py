"""couple: labels -> groups. One connected-components call per run of propagation ends it.

Everything here is arrays over components; equal footprints (passes/footprints.py) are one group.
Blocks: passes/blocks.py.
"""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor
from torch.fx import Node

from .blocks import block_tags
from .errors import module_of, user_line, where
from .footprints import Notes, Prints, even, united
from .groups import Consumer, DependencyGraph, Group, Layer, Member
from .pieces import apart, pieces
from .streams import Streams
from .values import Labels, Site, Source

__all__ = ["Consumer", "DependencyGraph", "Group", "Layer", "Member", "couple"]


def couple(
    labels: Labels, parameters: dict[str, Tensor], blocks: Labels | None = None
) -> DependencyGraph:
    """Groups of a run, and the whole blocks of that on blocks. `parameters`: under all names."""
    layers: list[Layer] = []
    groups: list[Group] = []
    for number, run in enumerate([labels] if blocks is None else [labels, blocks]):
        layer, prints = even(Layer(run, united(run.count, run.edges)), number)
        layers.append(layer)
        groups += _groups(layer, number, prints)
    names = _names(labels, parameters)
    shapes = {name: tuple(held.shape) for name, held in parameters.items() if names[name] == name}
    several = {told for name, told in names.items() if told != name}
    tied = {name: told for name, told in names.items() if told in several}
    return DependencyGraph(tuple(_named(groups)), shapes, tuple(layers), tied)


def _names(labels: Labels, parameters: dict[str, Tensor]) -> dict[str, str]:
    """For each name the one that is told: of a tied weight, that of its labels."""
    labelled = {source.name for source in labels.sources if source.kind == "parameter"}
    told: dict[int, str] = {}
    for name, held in parameters.items():
        if name in labelled or id(held) not in told:
            told[id(held)] = name
    return {name: told[id(held)] for name, held in parameters.items()}


def _groups(layer: Layer, number: int, prints: Prints) -> list[Group]:
    labels, notes = layer.labels, prints.notes
    sources = [source for source in labels.sources if source.kind == "parameter"]
    builder = _Builder(layer, number, notes, sources, prints.sites, _fed(labels), Streams(layer))
    return builder.build(prints.wanted, prints.footprint)


def _fed(labels: Labels) -> set[Node]:
    """Nodes whose numbers depend on an input; the others are made of weights alone."""
    fed: set[Node] = set()
    for node in labels.values:
        if node.op == "placeholder" or not fed.isdisjoint(node.all_input_nodes):
            fed.add(node)
    return fed


@dataclass
class _Builder:
    layer: Layer
    number: int
    notes: Notes
    sources: list[Source]
    sites: list[tuple[Site, np.ndarray]]
    fed: set[Node]
    streams: Streams

    def build(self, wanted: np.ndarray, footprint: np.ndarray) -> list[Group]:
        component, count = self.layer.component, len(wanted)
        first = np.full(count, len(component))
        np.minimum.at(first, component, np.arange(len(component)))
        units = np.flatnonzero(wanted)
        if not len(units):
            return []
        units = units[np.argsort(first[units], kind="stable")]
        key = footprint[units] * np.uint64(1_000_003) + self.notes.frozen[units].astype(np.uint64)
        _, start, inverse = np.unique(key, return_index=True, return_inverse=True)
        rank = np.argsort(np.argsort(start))[inverse]
        group_of, place = np.full(count, -1), np.zeros(count, int)
        group_of[units] = rank
        members = _split(units, rank, len(start))
        for held in members:
            place[held] = np.arange(len(held))
        owned = self._members(group_of, place, [len(m) for m in members])
        summed = self._sites(group_of, len(members))
        tags = block_tags(self.layer, wanted & (self.notes.frozen < 0))
        taken = pieces(self.layer.labels, component, group_of, place, len(members))
        return [
            self._group(held, owned[g], summed[g], tags, taken[g]) for g, held in enumerate(members)
        ]

    def _members(
        self, group_of: np.ndarray, place: np.ndarray, sizes: list[int]
    ) -> list[list[Member]]:
        found: list[list[Member]] = [[] for _ in sizes]
        for source in self.sources:
            units = self.layer.component[source.start : source.start + source.size]
            groups = group_of[units]
            for g in np.unique(groups[groups >= 0]):
                at = np.flatnonzero(groups == g)
                order = np.argsort(place[units[at]], kind="stable")
                indices = at[order].reshape(sizes[g], -1)
                found[g].append(Member(source.name, source.dim, indices))
        return found

    def _sites(self, group_of: np.ndarray, count: int) -> list[list[Site]]:
        found: list[list[Site]] = [[] for _ in range(count)]
        for site, units in self.sites:
            groups = group_of[units]
            for g in np.unique(groups[groups >= 0]):
                found[g].append(site)
        return found

    def _group(
        self,
        units: np.ndarray,
        members: list[Member],
        sites: list[Site],
        tags: np.ndarray,
        taken: list[np.ndarray],
    ) -> Group:
        _, start, inverse, sizes = np.unique(
            tags[units], return_index=True, return_inverse=True, return_counts=True
        )
        block_of = np.argsort(np.argsort(start))[inverse]
        ends, norms = self._parted(int(units[0]), sites)
        kind, reason = self._kind(int(units[0]), ends, norms, sizes)
        bent = bool(self.notes.flags["bent"][units].any())
        symmetry = "permutation" if bent or kind != "chain" else "invertible"
        consumers = tuple(_consumer(site, self.layer.labels) for site in ends)
        means = [_consumer(site, self.layer.labels) for site in norms]
        means = [] if kind in ("width", "frozen") else means
        least = max(int(self.notes.least[units[0]]), apart(taken, block_of) * len(sizes))
        return Group(
            *("", kind, symmetry, len(units), len(sizes), tuple(members), consumers, reason),
            *(self.number, least, block_of, units, tuple(taken), tuple(means)),
        )

    def _parted(self, unit: int, sites: list[Site]) -> tuple[list[Site], list[Site]]:
        """Where the axis ends, and means over it that come back to it (passes/streams.py)."""
        stuck = self.notes.frozen[unit] >= 0 or self.notes.mixed[unit] >= 0
        means = [site for site in sites if site.mean]
        norms = [site for site in means if stuck or self.streams.comes_back(site, unit)]
        return [site for site in sites if site not in norms], norms

    def _kind(
        self, unit: int, sites: list[Site], norms: list[Site], sizes: np.ndarray
    ) -> tuple[str, str]:
        notes = self.notes
        if notes.frozen[unit] >= 0:
            return "frozen", notes.reasons[notes.frozen[unit]]
        why = notes.mixed[unit]
        if why < 0 and norms:
            stream = self.streams.returns(sites, unit)
            exact = not stream and self.streams.passes(norms, unit)
            why = -1 if exact else notes.mean[unit]
        mixed = notes.reasons[why] if why >= 0 else ""
        routed = bool(notes.flags["routed"][unit])
        if not sites and not routed:
            return "frozen", mixed or self._at("nothing sums it away", unit)
        if len(set(sizes.tolist())) > 1:
            unequal = f"blocks of unequal size {sorted(set(sizes.tolist()))}"
            return "frozen", self._at(unequal, unit)
        if sizes.max() == 1:
            single = "each block has a single unit" if len(sizes) > 1 else "it is a single unit"
            return "frozen", self._at(single, unit)
        if routed:
            return "head", ""
        if mixed:
            return ("frozen" if self.number else "width"), mixed
        if self.number:
            return "head", ""
        weighed = all(self._weighed(site) for site in sites)
        return ("chain", "") if weighed else ("bilinear", "")

    def _at(self, what: str, unit: int) -> str:
        """`what`, and the node that last carries the unit."""
        return f"{what} · {where(self.streams.last(unit))}"

    def _weighed(self, site: Site) -> bool:
        """Whether one activation meets a weight; a sum over weights alone (a norm of them) has
        none.
        """
        read = sum(operand.data and operand.node in self.fed for operand in site.operands)
        return len(site.operands) > 1 and read == 1


def _split(units: np.ndarray, rank: np.ndarray, count: int) -> list[np.ndarray]:
    """Units by group, their order kept."""
    order = np.argsort(rank, kind="stable")
    bounds = np.searchsorted(rank[order], np.arange(1, count))
    return np.split(units[order], bounds)


def _consumer(site: Site, labels: Labels) -> Consumer:
    parameter, dim = "", -1
    for operand in sorted(site.operands, key=lambda o: o.labels.dim(), reverse=True):
        source = _owner(labels, operand.labels)
        if source is not None and not operand.data and not parameter:
            parameter, dim = source.name, source.dim
    return Consumer(site.node.name, parameter, dim, module_of(site.node), user_line(site.node))


def _owner(labels: Labels, array: Tensor) -> Source | None:
    """The weight dim that all labels of an array come from."""
    low, high = int(array.min()), int(array.max())
    at = bisect.bisect_right(labels.sources, low, key=lambda source: source.start) - 1
    source = labels.sources[at]
    inside = source.kind == "parameter" and high < source.start + source.size
    return source if inside else None


def _named(groups: list[Group]) -> list[Group]:
    """`owner.dim` of the first member; whole blocks end in `.blocks`; doubles are numbered."""
    used: dict[str, int] = {}
    result = []
    for group in groups:
        lead = group.members[0]
        base = re.sub(r"\.(weight|bias)$", "", lead.parameter)
        name = f"{base}.{lead.dim}" + (".blocks" if group.layer else "")
        used[name] = used.get(name, 0) + 1
        if used[name] > 1:
            name = f"{name}.{used[name]}"
        result.append(replace(group, name=name))
    return result
