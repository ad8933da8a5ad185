"""layers: which MLP and attention layers of a captured graph have a chain group of their own.

    MLP layer        a weight's contraction whose input comes from another weight's contraction
                     through pointwise ops, one of them not linear, and through nothing else
    attention layer  a fused attention op, or a product with a softmax as its left operand

Read off the graph; no module names.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.couple import DependencyGraph
from passes.labels import Value

CONTRACTIONS = {"linear", "addmm", "mm", "conv1d", "conv2d", "conv3d"}
CURVED = set(
    "relu relu_ gelu silu silu_ sigmoid tanh hardtanh hardswish hardsigmoid mish elu leaky_relu "
    "softplus relu6 pow square".split()
)
PASSING = CURVED | set(
    "mul mul_ reshape view permute transpose contiguous clone to dropout slice split chunk "
    "split_with_sizes batch_norm clamp unbind squeeze unsqueeze flatten select".split()
)
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
    for node in module.graph.nodes:
        if op_name(node) in CONTRACTIONS and _comes_from_a_weight(node.args[0], False, 0):
            yield node


def _comes_from_a_weight(node: Any, curved: bool, depth: int) -> bool:
    """Walk back through pointwise ops; every data operand of a gate must come from a weight."""
    name = op_name(node)
    if name in CONTRACTIONS:
        return curved
    if depth > 24 or (name not in PASSING and name != "getitem"):
        return False
    curved = curved or name in CURVED
    return any(_comes_from_a_weight(arg, curved, depth + 1) for arg in node.all_input_nodes)


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
    return bool(components & set(deps.component[last.reshape(-1).numpy()].tolist()))
