"""Labels and values: what propagation knows of a tensor.

Every dim of size > 1 of a value carries one label array: an int64 tensor that broadcasts to the
value's shape (size 1 on every dim along which the label does not change). The position p of the
dim is removed exactly if its label is. The dim is the array's home; other dims along which the
array varies enumerate blocks (heads). A dim whose positions have a meaning of their own (batch,
tokens, vocabulary) carries a single label that is frozen from birth, with the reason.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

Arrays = dict[int, Tensor]
BLOCKS = "whole blocks of a finer axis"


@dataclass(frozen=True)
class OpenAxes:
    """Axes of inputs and outputs that may shrink, by the position of the tensor: whoever calls the
    program hands a result back to it (a cache), so that both sides shrink together.
    """

    inputs: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    outputs: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


CLOSED = OpenAxes()


@dataclass(frozen=True)
class Source:
    """A run of labels: `size` indices of dim `dim` of `name`, from label `start` on."""

    kind: str  # parameter | constant | free | fixed
    name: str
    dim: int
    start: int
    size: int


@dataclass(frozen=True)
class Operand:
    """One side of a summed axis: the node, the dim of it, its labels there."""

    node: Node
    dim: int
    labels: Tensor
    data: bool  # not a weight: see Value.weight


@dataclass(frozen=True)
class Site:
    """An axis summed away at a node; `mean`: its sum is divided by the number of positions."""

    node: Node
    operands: tuple[Operand, ...]
    mean: bool = False


@dataclass(frozen=True)
class Mark:
    """What an op does to labels beside moving them.

    frozen    they never go
    mixed     every output on the axis depends on every input on it
    mean      likewise, but only through a mean
    bent      a pointwise non-linearity acts on them, so that only permutations may be inserted
    blocked   in the run on blocks: the labels of a block have been united
    routed    a choice among the positions of the axis (experts), in each row of the labels [rows,
              positions]; at least `least` of a row must stay
    """

    kind: str
    labels: Tensor
    reason: str
    node: Node | None = None
    least: int = 1


@dataclass(frozen=True)
class Value:
    """A node's result: its shape (on a fake tensor), label arrays, and its numbers if it depends
    on no input. `weight`: it is a parameter, moved or selected from but not computed with.
    `domain`: the labels that its integer values point at.
    """

    fake: Tensor
    arrays: Mapping[int, Tensor] = field(default_factory=dict)
    const: Tensor | None = None
    weight: bool = False
    domain: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The concrete shape."""
        return tuple(self.fake.shape)


@dataclass
class Labels:
    """The result of propagation: values by node, sources of labels, unions, sites and marks;
    `parts`: labels that an op looks at in equal parts [parts, labels of each]; `pairs`: those whose
    last axis is the two parts of a complex number; `inside`: labels of a batch axis of a
    contraction that vary along another axis (passes/layouts.py).
    """

    values: dict[Node, Any] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    count: int = 0
    edges: list[Tensor] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    fixed_labels: dict[tuple[str, int], int] = field(default_factory=dict)
    parts: list[Tensor] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    inside: list[Tensor] = field(default_factory=list)
    held: dict[tuple[torch.Size, int], Tensor] = field(default_factory=dict)

    def once(self, array: Tensor) -> Tensor:
        """The array, or the equal one that is held already: most ops hand labels on as they are."""
        key = (array.shape, hash(array.numpy().tobytes()))
        known = self.held.get(key)
        if known is None:
            known = self.held[key] = array.contiguous()
        return known if torch.equal(known, array) else array

    def fresh(self, kind: str, name: str, dim: int, size: int) -> Tensor:
        """`size` new labels."""
        self.sources.append(Source(kind, name, dim, self.count, size))
        self.count += size
        return torch.arange(self.count - size, self.count)

    def fixed(self, reason: str, rank: int, dim: int = 0) -> Tensor:
        """The one label of a dim whose positions never go, as an array of `rank` dims. `dim` tells
        dims of one reason apart, so that each keeps the reason of what it meets.
        """
        key = (reason, dim)
        if key not in self.fixed_labels:
            label = self.fresh("fixed", reason, 0, 1)
            self.fixed_labels[key] = int(label)
            self.marks.append(Mark("frozen", label, reason))
        return torch.full([1] * rank, self.fixed_labels[key])

    def is_fixed(self, array: Tensor) -> bool:
        """Whether the array is a single label that was frozen from birth."""
        return array.numel() == 1 and self.kind(array) == "fixed"

    def is_block(self, array: Tensor | None) -> bool:
        """Whether a dim is fixed only because it enumerates blocks of another."""
        if array is None or not self.is_fixed(array):
            return False
        return self._source(array).name.startswith(BLOCKS)

    def _source(self, array: Tensor) -> Source:
        first = int(array.reshape(-1)[0])
        at = bisect.bisect_right(self.sources, first, key=lambda source: source.start) - 1
        return self.sources[at]

    def kind(self, array: Tensor) -> str:
        """The kind of the source of the array's first label."""
        return self._source(array).kind

    def all_fixed(self, shape: Iterable[int], reason: str) -> Arrays:
        """Fixed labels on every dim of size > 1."""
        shape = tuple(shape)
        return {dim: self.fixed(reason, len(shape)) for dim, size in enumerate(shape) if size > 1}

    def arrays_for(self, kind: str, name: str, shape: Iterable[int]) -> Arrays:
        """New labels on every dim of size > 1."""
        shape = tuple(shape)
        return {
            dim: along(self.fresh(kind, name, dim, size), dim, len(shape))
            for dim, size in enumerate(shape)
            if size > 1
        }

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Labels that stand at the same place (after broadcasting) are one unit."""
        left, right = torch.broadcast_tensors(left, right)
        pairs = torch.stack([left.reshape(-1), right.reshape(-1)], 1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        if len(pairs):
            self.edges.append(pairs)

    def collapse(self, array: Tensor, dim: int) -> Tensor:
        """Unite along `dim` and narrow it to size 1: what varied there goes together."""
        if array.shape[dim] > 1:
            self.unite(array.narrow(dim, 0, 1), array)
        return array.narrow(dim, 0, 1)

    def alone(self, array: Tensor, dim: int) -> Tensor:
        """`array` that varies along `dim` only: collapsed along every other dim."""
        for other in range(array.dim()):
            array = self.collapse(array, other) if other != dim else array
        return array

    def meet(self, arrays: list[Tensor]) -> Tensor:
        """Arrays with the same home unite; a fixed one, else the one of fewest labels (united,
        the others say no more), stands for all.
        """
        if len(arrays) == 1:
            return arrays[0]
        for other in arrays[1:]:
            self.unite(arrays[0], other)
        return min(arrays, key=lambda a: (not self.is_fixed(a), len(torch.unique(a)), a.numel()))

    def mark(
        self, kind: str, arrays: Iterable[Tensor], reason: str, node: Node | None = None
    ) -> None:
        """Mark the labels of `arrays`."""
        for array in arrays:
            self.marks.append(Mark(kind, torch.unique(array), reason, node))


def along(labels: Tensor, dim: int, rank: int) -> Tensor:
    """A vector of labels as an array of `rank` dims that varies along `dim`."""
    return labels.view([-1 if k == dim else 1 for k in range(rank)])


def compress(array: Tensor) -> Tensor:
    """Size 1 on every dim along which the entries do not change."""
    for dim, size in enumerate(array.shape):
        if size > 1 and array.stride(dim) == 0:
            array = array.narrow(dim, 0, 1)
    for dim, size in enumerate(array.shape):
        if size > 1 and array.numel() and bool((array == array.narrow(dim, 0, 1)).all()):
            array = array.narrow(dim, 0, 1)
    return array.contiguous()


def varying(array: Tensor) -> list[int]:
    """The dims along which a compressed array varies."""
    return [dim for dim, size in enumerate(array.shape) if size > 1]
