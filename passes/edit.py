"""edit: one node of a graph that is rewritten, and the buffers that rewriting adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch.fx import GraphModule, Node

from .errors import UnsupportedOp
from .removal import Cuts, Removal
from .visit import bind, op_name


@dataclass(frozen=True)
class Edit:
    """One node to edit: the cuts of its inputs and outputs. Arguments by schema name in `bound`."""

    module: GraphModule
    node: Node
    ins: Mapping[Node, Cuts]
    outs: list[Cuts]
    cut: Removal

    @property
    def bound(self) -> dict[str, Any]:
        """Arguments by schema name."""
        return bind(self.node, self.node.args, self.node.kwargs)

    @property
    def source(self) -> Node:
        """The tensor that the op moves."""
        first = self.node.args[0]
        return first if isinstance(first, Node) else self.node.all_input_nodes[0]

    def shape(self, node: Node) -> tuple[int, ...]:
        """The dense shape of a node's result."""
        return tuple(self.cut.value(node.name).shape)

    def change(self, **arguments: Any) -> None:
        """Give the node new arguments, by schema name."""
        schema = self.node.target._schema.arguments  # type: ignore[union-attr]
        bound = {**self.bound, **arguments}
        self.node.args = tuple(bound[a.name] for a in schema if not a.kwarg_only)
        self.node.kwargs = {a.name: bound[a.name] for a in schema if a.kwarg_only}

    def become(self, target: Any, *args: Any) -> None:
        """Change the node's op and arguments."""
        self.node.target, self.node.args, self.node.kwargs = target, args, {}

    def positions(self, dim: int, old: list[int]) -> list[int]:
        """Where the kept ones among the old positions along `dim` of the source are now."""
        mask = self.ins[self.source].get(dim)
        if mask is None:
            return old
        rows = mask.movedim(dim, -1).reshape(-1, mask.shape[dim])
        moved = [[int(n) - 1 for n in row.cumsum(0)[old][row[old]]] for row in rows]
        if any(row != moved[0] for row in moved):
            raise UnsupportedOp(f"{op_name(self.node)} takes other places in each block")
        return moved[0]


def register(module: GraphModule, name: str, tensor: torch.Tensor) -> None:
    """A new buffer, on the device of the module's weights."""
    held = next(chain(module.parameters(), module.buffers()), tensor)
    module.register_buffer(name, tensor.to(held.device), persistent=False)


def hold(module: GraphModule, before: Node, name: str, tensor: torch.Tensor) -> Node:
    """A new buffer of the graph module, read just before a node."""
    register(module, name, tensor)
    with before.graph.inserting_before(before):
        return before.graph.get_attr(name)
