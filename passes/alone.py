"""alone: ops of the layers in scope by themselves, whole and cut, at the sizes of a batch.

A call is an op with all that decides how long it takes: its arguments but tensors, and of these
sizes, order in memory, dtype and device. Equal calls take equally long, so that of layers that
repeat one is measured. What a cut leaves of the tensors, and what it changes of the op, is what
the rewriter makes of the node (passes/rewrite.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .cost import scope
from .groups import DependencyGraph
from .observe import Walk, walk
from .removal import Removal, count, removal
from .rewrite import shrink_node
from .room import Room
from .values import Value

Pool = dict[tuple[Any, ...], Tensor]


@dataclass(frozen=True)
class Operand:
    """What a node reads. `order`: a tensor's dims as they lie in memory; `value`: what it is, where
    it holds no floating-point numbers.
    """

    name: str
    sizes: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    device: torch.device | None = None
    value: Any = None

    def after(self, cut: Removal) -> tuple[int, ...]:
        """The sizes that a cut leaves."""
        sizes = list(self.sizes)
        for dim, mask in cut.cuts(self.name).items():
            sizes[dim] = sizes[dim] * count(mask, dim) // mask.shape[dim]
        return tuple(sizes)

    def told(self, sizes: Sequence[int]) -> str:
        """`float32 [2, 7, 64] cpu`; with the order of the dims in memory where it is another."""
        if self.dtype is None or self.device is None:
            return f"{self.value}"
        order = "" if list(self.order) == sorted(self.order) else f" {list(self.order)}"
        return f"{self.dtype} {list(sizes)}{order} {self.device.type}".removeprefix("torch.")

    def make(self, sizes: Sequence[int], slot: int, pool: Pool) -> Any:
        """A tensor of these sizes: random numbers, which all calls of a pool share."""
        held = self.value
        if self.dtype is None or held is not None:
            for dim, size in enumerate(sizes):
                held = held.narrow(dim, 0, size)
            return held
        key, number = (slot, self.dtype, self.device), math.prod(sizes)
        if key not in pool or len(pool[key]) < number:
            pool[key] = torch.rand(number, device=self.device).to(self.dtype)
        lying = pool[key][:number].view([sizes[dim] for dim in self.order])
        return lying.permute([self.order.index(dim) for dim in range(len(sizes))])


@dataclass(frozen=True)
class Call:
    """`told` says all that its time depends on; `start(pool)` makes what runs it once; `host`: on
    the processor.
    """

    told: str
    start: Callable[[Pool], Callable[[], Any]]
    host: bool = True


@dataclass(frozen=True)
class Timed:
    """An op of a layer in scope: the weights that it reads, and what it reads altogether."""

    node: Node
    weights: tuple[str, ...]
    operands: tuple[Operand, ...]

    def call(self, module: GraphModule, cut: Removal) -> Call:
        """The op with what a cut leaves of it."""
        sizes = [operand.after(cut) for operand in self.operands]
        number = {arg: f"%{k}" for k, arg in enumerate(self.node.all_input_nodes)}
        args = pytree.tree_map(
            lambda a: number[a] if isinstance(a, Node) else a,
            (self.node.args, self.node.kwargs),
            is_leaf=lambda a: isinstance(a, Node),
        )
        read = " ".join(o.told(s) for o, s in zip(self.operands, sizes, strict=True))

        def start(pool: Pool) -> Callable[[], Any]:
            one = alone(module, self.node, cut)
            pairs = enumerate(zip(self.operands, sizes, strict=True))
            given = [operand.make(size, slot, pool) for slot, (operand, size) in pairs]
            return lambda: one(*given)

        host = all(o.device is None or o.device.type == "cpu" for o in self.operands)
        return Call(f"{self.node.target} {args} {read}", start, host)


def alone(module: GraphModule, node: Node, cut: Removal) -> GraphModule:
    """A graph of nothing but this node, rewritten; UnsupportedOp if that is refused."""
    graph = Graph()
    sources = {arg: graph.placeholder(arg.name) for arg in node.all_input_nodes}
    made = graph.node_copy(node, sources.__getitem__)
    graph.output(made)
    one = GraphModule(module, graph)
    shrink_node(one, made, cut, {})
    one.recompile()
    return one


def timed(module: GraphModule, deps: DependencyGraph, batch: Args, room: Room) -> list[Timed]:
    """The ops that read a parameter in scope, with what they read of a batch: one forward pass."""
    weights = dict(_readers(module, deps))
    found: list[Timed] = []

    def visit(state: Walk, node: Node) -> None:
        held = [_operand(arg, state) for arg in node.all_input_nodes]
        found.append(Timed(node, weights[node], tuple(held)))

    walk(module, [batch], weights, visit, room=room)
    return found


def _readers(module: GraphModule, deps: DependencyGraph) -> Iterator[tuple[Node, tuple[str, ...]]]:
    """Ops that compute with parameters in scope: which ones, through whatever moves them."""
    within, whole = scope(deps), removal(deps, {})
    moved: dict[Node, tuple[str, ...]] = {}
    for node in module.graph.nodes:
        value = whole.value(node.name)
        weight = isinstance(value, Value) and value.weight
        if node.op == "get_attr":
            name = deps.tied.get(str(node.target), str(node.target))
            moved[node] = (name,) if name in within else ()
            continue
        read = tuple(dict.fromkeys(n for arg in node.all_input_nodes for n in moved.get(arg, ())))
        if weight:
            moved[node] = read
        elif read and isinstance(node.target, torch._ops.OpOverload):
            yield node, read


def _operand(arg: Node, state: Walk) -> Operand:
    """What a node reads: of weights the shape is enough."""
    held = arg.op == "get_attr"
    value = state.held(str(arg.target)) if held else state.value(state.environments[0], arg)
    if not isinstance(value, Tensor):
        return Operand(arg.name, value=value)
    lies = sorted(range(value.dim()), key=lambda dim: (-value.stride(dim), dim))
    held = None if value.is_floating_point() or value.is_complex() else value
    return Operand(arg.name, tuple(value.shape), tuple(lies), value.dtype, value.device, held)
