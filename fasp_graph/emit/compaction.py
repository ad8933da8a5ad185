"""compaction: the weights of a model where some groups are cut and the others keep their size."""

from __future__ import annotations

import functools
from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.couple import Group
from passes.rewrite import attribute


@dataclass(frozen=True)
class Compaction:
    """A dense model, its compact graph, and the groups that lie between them."""

    model: nn.Module
    compact: GraphModule
    groups: tuple[Group, ...]
    kept: Mapping[str, tuple[int, ...]]

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The model's parameters and buffers -> their names in the compact graph."""
        return _names(self.model, self.compact)

    @functools.cached_property
    def gone(self) -> dict[tuple[str, int], dict[str, set[int]]]:
        """(parameter, dim) -> group -> positions that go with its removed units."""
        found: dict[tuple[str, int], dict[str, set[int]]] = {}
        for group in self.groups:
            kept = set(self.kept[group.name])
            for member in group.members:
                gone = {i for u, held in enumerate(member.indices) if u not in kept for i in held}
                found.setdefault((member.parameter, member.dim), {})[group.name] = gone
        return found

    def left(self, name: str, dim: int, size: int, cut: Container[str] | None) -> list[int]:
        """Positions that stay along a dim if the groups in `cut` (None: all) are cut."""
        groups = self.gone.get((name, dim), {})
        gone = set().union(*(p for g, p in groups.items() if cut is None or g in cut))
        return [i for i in range(size) if i not in gone]

    @functools.cached_property
    def full(self) -> dict[str, Tensor]:
        """Every weight at its old size, zero where units are gone."""
        found: dict[str, Tensor] = {}
        for name, theirs in self.names.items():
            old, new = attribute(self.model, name), attribute(self.compact, theirs).detach()
            if old.shape != new.shape:
                axes = [self.left(theirs, d, n, None) for d, n in enumerate(old.shape)]
                if [len(axis) for axis in axes] == list(new.shape):
                    new = spread(new, axes, old.shape)
            found[name] = new
        return found

    def value(self, name: str, cut: Container[str]) -> Tensor:
        """The weight without what the groups in `cut` lose, zero where other units are gone."""
        value, theirs = self.full[name], self.names[name]
        for dim, size in enumerate(value.shape):
            left = self.left(theirs, dim, size, cut)
            if len(left) < size:
                value = value.index_select(dim, torch.tensor(left, device=value.device))
        return value


def spread(new: Tensor, axes: list[list[int]], shape: torch.Size) -> Tensor:
    """`new` at the places `axes` of zeros of `shape`."""
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if len(axis) < size:
            zeros = new.new_zeros([*new.shape[:dim], size, *new.shape[dim + 1 :]])
            new = zeros.index_copy(dim, torch.tensor(axis, device=new.device), new)
    return new


def _names(model: nn.Module, compact: GraphModule) -> dict[str, str]:
    """The model's parameters and buffers -> their names in the compact graph, ties included."""
    held = {n for n, _ in compact.named_parameters(remove_duplicate=False)}
    held |= {n for n, _ in compact.named_buffers(remove_duplicate=False)}
    own = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known = {id(tensor): name for name, tensor in reversed(own) if name in held}
    return {name: known[id(tensor)] for name, tensor in own if id(tensor) in known}
