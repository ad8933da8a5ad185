"""sayable: a captured graph without what ONNX, or torch's exporter to it, has no words for.

inputs that the graph asserts to be what they were    constants, and no inputs
sizes that the graph asserts                          said nowhere
attention on [heads, tokens, channels]                on [1, heads, tokens, channels]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.bounds import is_bound
from passes.capture import Args
from passes.held import held_inputs
from passes.skeleton import shared_copy
from passes.visit import op_name

aten = torch.ops.aten


def sayable(module: GraphModule, inputs: Args) -> tuple[GraphModule, Args]:
    """A copy on the same weights that ONNX has words for, and its inputs; the graph itself if it
    needs no change.
    """
    held = held_inputs(module)
    attention = [node.name for node in module.graph.nodes if _missing(node)]
    bound = [node for node in module.graph.nodes if is_bound(node)]
    if not held and not attention and not bound:
        return module, inputs
    plain = shared_copy(module)
    for node in list(plain.graph.nodes):
        if is_bound(node):
            plain.graph.erase_node(node)
    plain.graph.eliminate_dead_code()
    nodes = {node.name: node for node in plain.graph.nodes}
    for name in attention:
        _widen(nodes[name])
    if held:
        inputs = _release(plain, inputs, held)
    plain.recompile()
    return plain, inputs


def _missing(node: Node) -> int:
    """How many of the four dims an attention lacks."""
    query = node.args[0] if op_name(node) == "scaled_dot_product_attention" else None
    value = query.meta.get("val") if isinstance(query, Node) else None
    return max(0, 4 - value.dim()) if isinstance(value, Tensor) else 0


def _widen(node: Node) -> None:
    """Dims of one around attention; masks broadcast to them."""
    graph, missing, narrow = node.graph, _missing(node), node
    args = list(node.args)
    for _ in range(missing):
        with graph.inserting_before(node):
            args[:3] = [graph.call_function(aten.unsqueeze.default, (a, 0)) for a in args[:3]]
    node.args = tuple(args)
    made = set()
    for _ in range(missing):
        with graph.inserting_after(narrow):
            narrow = graph.call_function(aten.squeeze.dim, (narrow, 0))
        made.add(narrow)
    node.replace_all_uses_with(narrow, delete_user_cb=lambda user: user not in made)


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
