"""Removal: which units are gone, and what that cuts off every value of the graph.

A label array on dim d says which positions of d go. Compressed, the mask may vary along other dims
(each head loses other channels; d is then cut block by block) or along another dim alone (whole
heads go; that dim is cut instead).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import Node

from .errors import UnsupportedOp
from .groups import DependencyGraph
from .values import Value, compress, varying

Cuts = dict[int, Tensor]
"""dim -> what stays, in the order of application; each mask is cut by those before it."""


@dataclass(frozen=True)
class Removal:
    """`gone[layer][component]`: the removed units of each run of propagation; `uncounted`: those
    of them that a mean does not count either, as if they had never been there (groups of kind
    width).
    """

    deps: DependencyGraph
    gone: tuple[np.ndarray, ...]
    uncounted: tuple[np.ndarray, ...]
    _values: tuple[dict[str, Any], ...] = field(repr=False)
    _cache: dict[tuple[str, int], Cuts] = field(default_factory=dict, repr=False)

    def value(self, name: str, slot: int = 0, layer: int = 0) -> Any:
        """What a run knows of a node's result (of result `slot` where there are several)."""
        found = self._values[layer].get(name)
        if isinstance(found, (list, tuple)):
            return found[slot] if slot < len(found) else None
        return found

    def results(self, name: str) -> int:
        """How many results a node has."""
        found = self._values[0].get(name)
        return len(found) if isinstance(found, (list, tuple)) else 1

    def mask(self, array: Tensor, layer: int) -> Tensor:
        """True where the label of an array stays."""
        return self._stays(array, layer, self.gone)

    def _stays(self, array: Tensor, layer: int, gone: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(~gone[layer][self.deps.layers[layer].component[array.numpy()]])

    def share(self, name: str, dims: Iterable[int]) -> Fraction:
        """The share of positions along dims of a node's result that stay, of those that a mean
        over them counts.
        """
        found = Fraction(1)
        cuts, all_cuts = self._find(name, 0, self.uncounted), self.cuts(name)
        for dim in dims:
            if dim in all_cuts:
                whole = self.value(name).shape[dim]
                counted = count(cuts[dim], dim) if dim in cuts else whole
                found *= Fraction(count(all_cuts[dim], dim), counted)
        return found

    def cuts(self, name: str, slot: int = 0) -> Cuts:
        """What is cut off a node's result."""
        key = (name, slot)
        if key not in self._cache:
            self._cache[key] = self._find(name, slot, self.gone)
        return self._cache[key]

    def _find(self, name: str, slot: int, gone: Sequence[np.ndarray]) -> Cuts:
        found: Cuts = {}
        for layer in range(len(gone)):
            value = self.value(name, slot, layer)
            if not isinstance(value, Value):
                continue
            for dim, array in value.arrays.items():
                mask = self._stays(array, layer, gone)
                if bool(mask.all()):
                    continue
                mask = compress(mask)
                dims = varying(mask)
                if not dims:
                    raise UnsupportedOp(f"nothing would be left of axis {dim} of %{name}")
                home = dim if dim in dims else dims[-1]
                found[home] = found[home] & mask if home in found else mask
        return _ordered(found)


def _ordered(masks: Cuts) -> Cuts:
    """Cut first what depends on no other cut; reduce the masks of the others by it."""
    pending, result = dict(masks), {}
    while pending:
        free = [d for d, m in pending.items() if all(m.shape[o] == 1 for o in pending if o != d)]
        if not free:
            raise UnsupportedOp("axes would be cut in blocks of each other")
        dim = free[0]
        mask = result[dim] = pending.pop(dim)
        pending = {d: take(m, dim, mask) if m.shape[dim] > 1 else m for d, m in pending.items()}
    return result


def removal(deps: DependencyGraph, kept: Mapping[str, Any]) -> Removal:
    """The units of each group of `kept` that are not kept are gone."""
    counts = [int(layer.component.max(initial=0)) + 1 for layer in deps.layers]
    gone, uncounted = (tuple(np.zeros(count, bool) for count in counts) for _ in range(2))
    for name, units in kept.items():
        group = deps[name]
        for table in (gone, uncounted) if group.kind == "width" else (gone,):
            table[group.layer][group.components] = True
            table[group.layer][group.components[list(units)]] = False
    values = tuple(
        {node.name: value for node, value in layer.labels.values.items()} for layer in deps.layers
    )
    return Removal(deps, gone, uncounted, values)


def take(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    """`tensor` with what stays along `dim`; every block keeps the same number."""
    size, order = count(mask, dim), places(mask, dim)
    if order.numel() == order.shape[dim]:
        return tensor.index_select(dim, order.reshape(-1).to(tensor.device))
    shape = [n if k != dim else size for k, n in enumerate(tensor.shape)]
    return tensor.gather(dim, order.expand(shape).to(tensor.device))


def places(mask: Tensor, dim: int) -> Tensor:
    """Where what stays along `dim` stands, block by block."""
    return (~mask).to(torch.int8).argsort(dim=dim, stable=True).narrow(dim, 0, count(mask, dim))


def sliced(tensor: Tensor, cuts: Cuts) -> Tensor:
    """`tensor` without what the cuts remove."""
    for dim, mask in cuts.items():
        tensor = take(tensor, dim, mask)
    return tensor


def count(mask: Tensor, dim: int) -> int:
    """How many stay along `dim`; the same in every block, or UnsupportedOp."""
    sizes = torch.unique(mask.sum(dim))
    if len(sizes) != 1:
        raise UnsupportedOp(f"blocks would keep unequal numbers of units: {sizes.tolist()}")
    if not int(sizes[0]):
        raise UnsupportedOp("nothing would be left of an axis")
    return int(sizes[0])


def is_constant(value: Any) -> bool:
    """Whether a node's result depends on no input."""
    return isinstance(value, Value) and value.const is not None


def nodes_by_name(nodes: Any) -> dict[str, Node]:
    """The graph's nodes by name."""
    return {node.name: node for node in nodes}
