"""layers: which MLP and attention layers of a captured graph have a chain group of their own.

    MLP layer        a weight's contraction whose input comes from another weight's contraction
                     through pointwise ops, one of them not linear, and through nothing else
    attention layer  a fused attention op, or a product with a softmax as its left operand

Read off the graph; no module names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.groups import DependencyGraph
from passes.values import Value

CONTRACTIONS = {"linear", "addmm", "mm", "conv1d", "conv2d", "conv3d"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CURVED = _words(
    "relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid mish elu leaky_relu softplus relu6 "
    "pow square exp erf where clamp"
)
PASSING = CURVED | _words(
    "mul div neg reshape view permute transpose contiguous clone to dropout slice split chunk "
    "split_with_sizes batch_norm unbind squeeze unsqueeze flatten select getitem gt lt ge le rsub "
    "abs log1p expm1"
)
SUMS = _words("add sub")
PRODUCTS = {"matmul", "bmm", "einsum"}


def layers_with_chains(module: GraphModule, deps: DependencyGraph) -> dict[str, list[int]]:
    """{"mlp": [with a chain group, all], "attention": [...]}"""
    chains = [g for g in deps.groups if g.kind == "chain"]
    consumers = {c.node for g in chains for c in g.consumers}
    components = {unit for g in chains for unit in g.components}
    mlp = [node.name in consumers for node in _mlp_outputs(module)]
    attention = [
        _holds(deps, components, value) or node.name in consumers
        for node, value in _attention_values(module)
    ]
    return {"mlp": [sum(mlp), len(mlp)], "attention": [sum(attention), len(attention)]}


def op_name(node: Any) -> str:
    """`linear` for aten.linear.default; the name of any other function."""
    if not isinstance(node, Node) or node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._opname
    return getattr(node.target, "__name__", "")


def _mlp_outputs(module: GraphModule) -> Iterator[Node]:
    known: dict[Node, Traced] = {}
    for node in module.graph.nodes:  # in order: what a node needs is known before it
        known[node] = _traced(node, known)
        if op_name(node) not in CONTRACTIONS or not isinstance(node.args[0], Node):
            continue
        if known[node.args[0]].sources and known[node.args[0]].curved:
            yield node


@dataclass(frozen=True)
class Traced:
    """The weight contractions that a value is made from by pointwise ops (none: by others too),
    and whether one of those ops is curved.
    """

    sources: frozenset[Node] = frozenset()
    curved: bool = False


def _traced(node: Node, known: dict[Node, Traced]) -> Traced:
    name = op_name(node).rstrip("_")
    if name in CONTRACTIONS:
        return Traced(frozenset([node]))
    data = [known[arg] for arg in node.all_input_nodes]
    found = [traced for traced in data if traced.sources]
    if not found or name not in PASSING | SUMS:
        return Traced()
    if name in SUMS and len({traced.sources for traced in found}) > 1:
        return Traced()  # a residual: the axis is not this layer's own
    if name in SUMS and any(not t.sources and _is_data(a) for t, a in _pairs(data, node)):
        return Traced()
    sources = frozenset().union(*(traced.sources for traced in found))
    return Traced(sources, name in CURVED or any(traced.curved for traced in found))


def _pairs(data: list[Traced], node: Node) -> Iterator[tuple[Traced, Node]]:
    return zip(data, node.all_input_nodes, strict=True)


def _is_data(node: Node) -> bool:
    """Whether the value depends on an input (a weight or a constant does not)."""
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at.op == "placeholder":
            return True
        seen.add(at)
        pending += [arg for arg in at.all_input_nodes if arg not in seen]
    return False


def _attention_values(module: GraphModule) -> Iterator[tuple[Node, Node]]:
    """(attention node, its value operand)"""
    for node in module.graph.nodes:
        name = op_name(node)
        if "scaled_dot_product" in name:
            yield node, node.args[2]
        elif name in PRODUCTS and _is_softmax(node.args[0], 0):
            operands = node.args[1] if name == "einsum" else node.args
            yield node, operands[1]


def _is_softmax(node: Any, depth: int) -> bool:
    if op_name(node) in ("softmax", "_softmax"):
        return True
    moves = ("dropout", "to", "reshape", "view", "expand", "clone", "contiguous")
    return depth < 6 and op_name(node) in moves and _is_softmax(node.args[0], depth + 1)


def _holds(deps: DependencyGraph, components: set[int], value: Node) -> bool:
    held = deps.labels.values.get(value)
    if not isinstance(held, Value):
        return False
    last = held.arrays.get(len(held.shape) - 1)
    if last is None:
        return False
    return bool(components & set(deps.layers[0].component[last.reshape(-1).numpy()].tolist()))
