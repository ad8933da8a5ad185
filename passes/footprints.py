"""footprints: what a unit (a connected component of labels) stands on, as arrays over units.

A footprint is a hash that adds a random key for every weight dim (in its multiplicity) and every
site that a unit stands at; units of equal footprint are a group.

    group_norm(cat([a, b], 1), 2)     the rows of [2, c]: here a, there b

The rows of such an array must lose equally many units each (passes/blocks.py). A group loses
equally many in each of its own blocks, so rows that hold the same number of units of each group are
even. Where they do not, place j of all rows becomes one unit: the rows then lose the same places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import rows_of
from .groups import Layer
from .values import Site


@dataclass
class Notes:
    """Per unit: the reason (an index, -1: none) why it is frozen, mixed or under a mean, and
    flags.
    """

    reasons: list[str]
    frozen: np.ndarray
    mixed: np.ndarray
    mean: np.ndarray
    flags: dict[str, np.ndarray]
    least: np.ndarray


@dataclass
class Prints:
    """`wanted`: units that groups are made of; `sites`: each with the units that end there."""

    notes: Notes
    wanted: np.ndarray
    footprint: np.ndarray
    sites: list[tuple[Site, np.ndarray]]


def united(count: int, edges: Sequence[Tensor]) -> np.ndarray:
    """The connected component of each of `count` labels."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges:
        return np.arange(count)
    pairs = torch.cat(list(edges)).numpy()
    ones = np.ones(len(pairs), np.int8)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def even(layer: Layer, number: int) -> tuple[Layer, Prints]:
    """The layer, its units united until the rows of every array hold as many of each group."""
    prints = footprints(layer, number)
    while edges := _uneven(layer, prints):
        units = united(len(prints.wanted), edges)
        layer = Layer(layer.labels, units[layer.component])
        prints = footprints(layer, number)
    return layer, prints


def _uneven(layer: Layer, prints: Prints) -> list[Tensor]:
    """Pairs of units at the same place of rows that hold other numbers of units of some group."""
    goes = prints.wanted & (prints.notes.frozen < 0)
    group = np.where(goes, prints.footprint, 0)
    found = []
    for rows in rows_of(layer):
        held = group[rows]
        if held.any():
            held = np.sort(held, axis=1)
            if (held != held[0]).any():
                pairs = np.stack([np.broadcast_to(rows[0], rows.shape), rows], -1).reshape(-1, 2)
                pairs = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
                found += [torch.from_numpy(pairs.astype(np.int64))] if len(pairs) else []
    return found


def footprints(layer: Layer, number: int) -> Prints:
    """Of a run of propagation; in the one on blocks (`number` 1) blocks alone are wanted."""
    labels, component = layer.labels, layer.component
    count = int(component.max()) + 1 if len(component) else 0
    notes = _notes(layer, count)
    owned = np.zeros(count, bool)
    footprint = np.zeros(count, np.uint64)
    keys = np.random.default_rng(0)
    for source in labels.sources:
        if source.kind == "parameter":
            units = component[source.start : source.start + source.size]
            owned[units] = True
            np.add.at(footprint, units, keys.integers(1, 2**62, dtype=np.uint64))
    sites: list[tuple[Site, np.ndarray]] = []
    for site in labels.sites:
        ends = [component[side.labels.reshape(-1).numpy()] for side in site.operands]
        units = np.unique(np.concatenate(ends))
        footprint[units] += keys.integers(1, 2**62, dtype=np.uint64)
        sites.append((site, units))
    wanted = owned & notes.flags["blocked"] if number else owned
    return Prints(notes, wanted, footprint, sites)


def _routed(units: np.ndarray, least: int) -> int:
    """How many units must stay for `least` positions of every row to stay."""
    row, every = len(np.unique(units[0])), len(np.unique(units))
    return -(-least * row // units.shape[1]) * (every // row)


def _notes(layer: Layer, count: int) -> Notes:
    notes = Notes(
        [],
        np.full(count, -1),
        np.full(count, -1),
        np.full(count, -1),
        {kind: np.zeros(count, bool) for kind in ("bent", "blocked", "routed")},
        np.ones(count, int),
    )
    for mark in layer.labels.marks:
        units = layer.component[mark.labels.numpy()]
        if mark.kind == "routed":
            notes.least[units] = np.maximum(notes.least[units], _routed(units, mark.least))
        if mark.kind in notes.flags:
            notes.flags[mark.kind][units] = True
            continue
        table = {"frozen": notes.frozen, "mixed": notes.mixed, "mean": notes.mean}[mark.kind]
        table[units[table[units] < 0]] = len(notes.reasons)
        notes.reasons.append(mark.reason)
    return notes
