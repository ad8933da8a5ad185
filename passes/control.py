"""control: control flow of torch taken apart into ops that the analysis knows.

    cond(p, f, g, x)    ->  where(p, f(x), g(x))      both are computed
    map(f, x)           ->  vmap(f)(x)
    scan(f, c, x)       ->  f(f(c, x[0]), x[1]) ...   of at most STEPS steps

The op stays as it is, and says why, where that is not the same: a branch that draws numbers or
writes into what it is given, results of two shapes, a number of steps that is not known.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Interpreter, Node

from .errors import brief
from .pointwise import DRAWN_LIKE, draws
from .visit import op_name
from .vmapped import trace_again

COND, SCAN = torch.ops.higher_order.cond, torch.ops.higher_order.scan
MAP = torch.ops.higher_order.map_impl
STEPS = 64
WHY = "why_whole"
"""In node.meta: why a call was not taken apart."""


def open_control(module: GraphModule) -> bool:
    """Take cond, map and scan apart where that computes the same (in place); whether any was."""
    opened = False
    for node in list(module.graph.nodes):
        if node.op == "call_function" and node.target in CALLS:
            for unused in [user for user in node.users if not user.users]:
                module.graph.erase_node(unused)
            try:
                apart = node.target is MAP or any(map(_maps, _bodies(module, node)))
                trace_again(module, [node, *node.users], calls=CALLS, apart=apart)
            except Exception as error:  # a body may refuse to be traced in any way
                node.meta[WHY] = brief(str(error).partition("\n")[0], 160)
            else:
                opened = True
    return opened


def has_steps(module: GraphModule) -> bool:
    """Whether a scan stands in the graph; with a plain number of steps it might not."""
    return bool(module.graph.find_nodes(op="call_function", target=SCAN))


def leave_control(module: GraphModule) -> None:
    """Say of each call that its parts did not compute what it does."""
    for node in module.graph.nodes:
        if node.op == "call_function" and node.target in CALLS:
            node.meta[WHY] = "taken apart it computes other numbers, or none"


def _bodies(module: GraphModule, node: Node) -> list[GraphModule]:
    held = [operator.attrgetter(str(a.target))(module) for a in node.args if _is_held(a)]
    return [body for body in held if isinstance(body, GraphModule)]


def _is_held(item: Any) -> bool:
    return isinstance(item, Node) and item.op == "get_attr"


def _maps(body: GraphModule) -> bool:
    """Whether a map stands in a body, or in what that holds."""
    held = [part for part in body.modules() if isinstance(part, GraphModule)]
    return any(part.graph.find_nodes(op="call_function", target=MAP) for part in held)


class _Beyond(Exception):
    """A call that plain ops do not repeat."""


class _Body(Interpreter):
    """Runs what a call of control flow holds; what is nested in it is taken apart as well."""

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def run_node(self, n: Node) -> Any:
        """The value of a node; _Beyond for control flow that stays, and for random numbers."""
        if isinstance(n.target, HigherOrderOperator) and n.target not in CALLS:
            raise _Beyond(f"it holds {n.target}")
        if draws(n) or op_name(n) in DRAWN_LIKE:
            raise _Beyond(f"it draws numbers ({n.target})")
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The value of a call."""
        return CALLS.get(target, target)(*args, **kwargs)


def _chosen(
    predicate: Any, true: GraphModule, false: GraphModule, operands: Sequence[Any]
) -> list[Tensor]:
    if not isinstance(predicate, Tensor):
        raise _Beyond("a size decides")
    if any(map(_writes, (true, false))):
        raise _Beyond("a branch writes into what it is given")
    results = list(zip(*(_Body(body)(*operands) for body in (true, false)), strict=True))
    if not all(isinstance(a, Tensor) and a.shape == b.shape for a, b in results):
        raise _Beyond("its branches give other shapes")
    return [torch.where(predicate.reshape(()), a, b) for a, b in results]


def _writes(body: GraphModule) -> bool:
    """Whether a branch writes into what it is given, or into a view of it."""
    schemas = [(node, getattr(node.target, "_schema", None)) for node in body.graph.nodes]
    written = [node.args[0] for node, schema in schemas if schema and schema.is_mutable]
    return any(not _made(at) for at in written)


def _made(at: Any) -> bool:
    """Whether a node is memory of its own."""
    while isinstance(at, Node) and isinstance(at.target, OpOverload):
        if at.target._schema.returns[0].alias_info is None:
            return True
        at = at.args[0]
    return False


def _mapped(body: GraphModule, xs: Sequence[Tensor], held: Sequence[Any]) -> Any:
    return torch.vmap(_Body(body), (*[0] * len(xs), *[None] * len(held)))(*xs, *held)


def _stepped(
    body: GraphModule, carry: Sequence[Tensor], xs: Sequence[Tensor], held: Sequence[Any]
) -> list[Tensor]:
    steps, count = xs[0].shape[0], len(carry)
    if not isinstance(steps, int) or steps > STEPS:
        raise _Beyond(f"it has {steps} steps, not a plain number up to {STEPS}")
    made = []
    for step in range(steps):
        results = _Body(body)(*carry, *(x.select(0, step) for x in xs), *held)
        carry = results[:count]
        made.append(results[count:])
    return [*carry, *(torch.stack(each) for each in zip(*made, strict=True))]


CALLS: dict[Any, Callable[..., Any]] = {
    COND: _chosen,
    MAP: _mapped,
    SCAN: _stepped,
}
