"""sayable: a captured graph without what ONNX, or torch's exporter to it, has no words for.

inputs that the graph asserts to be what they were    constants, and no inputs
attention on [heads, tokens, channels]                on [1, heads, tokens, channels]
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.capture import Args
from passes.held import held_inputs
from passes.visit import op_name

aten = torch.ops.aten


def sayable(module: GraphModule, inputs: Args) -> tuple[GraphModule, Args]:
    """A copy that ONNX has words for, and its inputs; the graph itself if it needs no change."""
    held = held_inputs(module)
    attention = [n.name for n in module.graph.nodes if _of_three_dims(n)]
    if not held and not attention:
        return module, inputs
    plain = copy.deepcopy(module)
    nodes = {node.name: node for node in plain.graph.nodes}
    for name in attention:
        _widen(nodes[name])
    if held:
        inputs = _release(plain, inputs, held)
    plain.recompile()
    return plain, inputs


def _of_three_dims(node: Node) -> bool:
    return op_name(node) == "scaled_dot_product_attention" and _rank(node.args[0]) == 3


def _rank(node: object) -> int:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value.dim() if isinstance(value, Tensor) else 0


def _widen(node: Node) -> None:
    """A batch of one around attention; masks broadcast to it."""
    graph = node.graph
    with graph.inserting_before(node):
        wide = [graph.call_function(aten.unsqueeze.default, (arg, 0)) for arg in node.args[:3]]
    node.args = (*wide, *node.args[3:])
    with graph.inserting_after(node):
        narrow = graph.call_function(aten.squeeze.dim, (node, 0))
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user is not narrow)


def _release(module: GraphModule, inputs: Args, held: frozenset[int]) -> Args:
    """Take the inputs `held` off the graph; the others, which go in by position."""
    graph = module.graph
    graph.set_codegen(CodeGen())
    for node in list(graph.nodes):
        if op_name(node) == "_assert_async":
            graph.erase_node(node)
    graph.eliminate_dead_code()
    for k, node in enumerate(list(graph.find_nodes(op="placeholder"))):
        if k in held:
            graph.erase_node(node)
    return tuple(v for k, v in enumerate(pytree.tree_leaves(inputs)) if k not in held), {}
