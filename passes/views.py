"""views: a consumer as a matrix, Y = X W^T, whatever op it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.fx import Node

from .visit import bind


class Seen(Protocol):
    """A consumer, as errors name it."""

    @property
    def node(self) -> Node:
        """Where it stands."""

    @property
    def parameter(self) -> str:
        """Its weight."""


@dataclass(frozen=True)
class View:
    """A consumer as a matrix: Y = X W^T with W [out, in * kernel]; column j belongs to index
    j // kernel.
    """

    node: Node
    parameter: str
    dim: int
    source: Node
    source_dim: int

    @property
    def convolution(self) -> bool:
        """Whether the consumer is a convolution."""
        return "conv" in str(self.node.target)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [out, in * kernel]."""
        return (
            weight.flatten(1) if self.convolution else weight.movedim(self.dim, -1).flatten(0, -2)
        )

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        if self.convolution:
            return matrix.reshape(like.shape)
        shape = list(like.movedim(self.dim, -1).shape)
        return matrix.reshape(shape).movedim(-1, self.dim).contiguous()

    def outputs(self, value: Tensor) -> Tensor:
        """The output, or anything of its layout, as [tokens, out]."""
        moved = value.movedim(self.source_dim, -1) if self.convolution else value
        return moved.reshape(-1, moved.shape[-1])

    def rows(self, value: Tensor, weight: Tensor) -> Tensor:
        """The input as [tokens, in * kernel]."""
        if not self.convolution:
            moved = value.movedim(self.source_dim, -1)
            return moved.reshape(-1, moved.shape[-1])
        bound = bind(self.node, self.node.args, self.node.kwargs)
        n = weight.dim() - 2
        strides, gaps = (_each(bound.get(name, 1), n) for name in ("stride", "dilation"))
        value = _padded(value if value.dim() == n + 2 else value[None], weight, bound, gaps)
        for d, (stride, gap) in enumerate(zip(strides, gaps, strict=True)):
            span = gap * (weight.shape[2 + d] - 1) + 1
            value = value.unfold(2 + d, span, stride)[..., ::gap]
        places = [0, *range(2, 2 + n), 1, *range(2 + n, 2 + 2 * n)]
        return value.permute(places).flatten(1 + n).flatten(0, n)


def _each(size: Any, n: int) -> list[int]:
    """A size per spatial dim; torch takes one number for all."""
    sizes = list(size) if isinstance(size, (list, tuple)) else [size]
    return sizes * n if len(sizes) == 1 else sizes


def _padded(value: Tensor, weight: Tensor, bound: dict[str, Any], gaps: list[int]) -> Tensor:
    """The input of a convolution with its zero padding; "same" pads the larger half at the end."""
    n, padding = weight.dim() - 2, bound.get("padding", 0)
    if padding == "valid":
        return value
    sides: list[int] = []
    for d in reversed(range(n)):
        whole = gaps[d] * (weight.shape[2 + d] - 1)
        left = whole // 2 if padding == "same" else _each(padding, n)[d]
        sides += [left, whole - left if padding == "same" else left]
    return torch.nn.functional.pad(value, sides)
