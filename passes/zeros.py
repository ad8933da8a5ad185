"""zeros: whether a value is zero at a unit whose weights are zero, tried op by op.

    f(0, r) = 0    for random r: f keeps zeros of the operands that carry the unit

A product, a ReLU or a convolution does, an exponential or the subtraction of a mean does not. Zeros
that reach a norm by mean squares stand for what is gone; other numbers there do not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from .made import BY_SIZE
from .values import Value
from .visit import op_name

Carries = Callable[[Node], bool]
BESIDE = {"cat", "stack", "slice_scatter", "select_scatter"}  # other units stand in other places


class Zeros:
    """The trials of one program; equal calls are tried once."""

    def __init__(self, values: Mapping[Node, Any]) -> None:
        self.values = values
        self.tried: dict[str, bool] = {}

    def stay(self, end: Node, carries: Carries) -> bool:
        """Whether zeros in the weights that carry a unit are zeros of `end` there."""
        found: set[Node] = set()
        waiting = [end]
        while waiting:
            node = waiting.pop()
            if node not in found:
                found.add(node)
                waiting += [arg for arg in node.all_input_nodes if carries(arg)]
        return all(self._keeps(node, found) for node in found)

    def _keeps(self, node: Node, carriers: set[Node]) -> bool:
        value = self.values[node]
        if isinstance(value, Value) and value.const is not None:
            return not bool(value.const.any())
        if node.op == "get_attr":
            return isinstance(value, Value)
        if node.op != "call_function":
            return False
        if carriers.isdisjoint(node.all_input_nodes) and op_name(node) not in BY_SIZE:
            return False
        if op_name(node) in BESIDE:
            return True
        shown = pytree.tree_map(
            lambda a: _shown(self.values[a], a in carriers) if isinstance(a, Node) else repr(a),
            (node.args, dict(node.kwargs)),
        )
        key = repr((str(node.target), shown))
        if key not in self.tried:
            self.tried[key] = self._try(node, carriers)
        return self.tried[key]

    def _try(self, node: Node, carriers: set[Node]) -> bool:
        draw = torch.Generator().manual_seed(0)
        args, kwargs = pytree.tree_map(
            lambda a: _made(self.values[a], a in carriers, draw) if isinstance(a, Node) else a,
            (node.args, dict(node.kwargs)),
        )
        try:
            with torch.no_grad():
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # an op may refuse random operands in any way
            return False
        leaves = pytree.tree_leaves(result)
        return not any(isinstance(leaf, Tensor) and bool(leaf.any()) for leaf in leaves)


def _shown(value: Any, carried: bool) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shown(item, carried) for item in value]
    return (value.shape, str(value.fake.dtype), carried) if isinstance(value, Value) else value


def _made(value: Any, zero: bool, draw: torch.Generator) -> Any:
    """Zeros, or numbers between 0.5 and 1.5; constants as they are."""
    if isinstance(value, (list, tuple)):
        return [_made(item, zero, draw) for item in value]
    if not isinstance(value, Value):
        return value
    if value.const is not None:
        return value.const
    if zero:
        return torch.zeros(value.shape, dtype=value.fake.dtype)
    return (torch.rand(value.shape, generator=draw) + 0.5).to(value.fake.dtype)
