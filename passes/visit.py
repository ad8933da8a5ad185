"""Visit: one call of the graph as propagation and the rewriter look at it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import where
from .values import Arrays, Labels, Value


@dataclass(frozen=True)
class Visit:
    """A node with its arguments by schema name: as nodes (`bound`) and as values (`given`).

    `outs` are the fake results. `outer`: this run labels blocks instead of what is inside them.
    """

    labels: Labels
    node: Node
    bound: Mapping[str, Any]
    given: Mapping[str, Any]
    outs: tuple[Any, ...]
    outer: bool

    @property
    def name(self) -> str:
        """The op's name without overload."""
        return op_name(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first result."""
        return tuple(self.outs[0].shape)

    def values(self) -> Iterator[Value]:
        """All tensor arguments, in order."""
        for item in self.given.values():
            for value in item if isinstance(item, (list, tuple)) else (item,):
                if isinstance(value, Value):
                    yield value

    def dim(self, name: str, rank: int, default: int = 0) -> int:
        """An argument that names a dim, not negative."""
        value = self.given.get(name)
        return int(default if value is None else value) % max(rank, 1)

    def fixed(self, what: str) -> Tensor:
        """A fixed label for a dim of the first result."""
        return self.labels.fixed(self.reason(what), len(self.shape))

    def reason(self, what: str) -> str:
        """`what · node · module · line`."""
        return f"{what} · {where(self.node)}"

    def freeze(self, arrays: Iterator[Tensor] | list[Tensor], what: str) -> None:
        """Mark the labels of `arrays` frozen."""
        self.labels.mark("frozen", arrays, self.reason(what), self.node)

    def all_fixed(self, what: str) -> list[Arrays]:
        """Fixed labels for every dim of every result."""
        reason = self.reason(what)
        return [
            {
                dim: self.labels.fixed(reason, out.dim(), dim)
                for dim, size in enumerate(out.shape)
                if size > 1
            }
            if isinstance(out, Tensor)
            else {}
            for out in self.outs
        ]

    def unknown(self, what: str) -> list[Arrays]:
        """All that the op touches stays: its operands are frozen, its results fixed."""
        for value in self.values():
            self.freeze(list(value.arrays.values()), what)
        return self.all_fixed(what)


def op_name(node: Node) -> str:
    """`linear` of `aten.linear.default`; `mylib.scan` for ops outside aten; '' for no call."""
    if node.op != "call_function":
        return ""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(getattr(node.target, "__name__", node.target))
    space, name = node.target._schema.name.split("::")
    return name if space == "aten" else f"{space}.{name}"


def bind(node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by schema name, defaults filled in; positions where the op has no schema."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return {**{str(k): a for k, a in enumerate(args)}, **kwargs}
    bound = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(args):
            bound[argument.name] = args[position]
        elif argument.name in kwargs:
            bound[argument.name] = kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def tensor_arguments(node: Node) -> list[str]:
    """Schema names of the arguments that are tensors, in order."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    return [a.name for a in schema if "Tensor" in str(a.type)]
