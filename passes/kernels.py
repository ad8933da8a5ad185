"""kernels: the same numbers in shapes that fast kernels take.

    attention(q, k, v) = attention(q, k, [v, 0]) without its last columns

Where V is narrower than Q and K, torch's attention has no fused kernel and falls back to one that
writes the whole matrix of attention weights. V is padded with zeros to the width of Q, and the
zeros are cut off the result. `narrow` undoes it for runtimes that do not mind.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from .capture import Args

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_MARK = "padded_value"


class _Widths(Interpreter):
    """Runs a graph and notes the last dims of Q and V at each attention."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.found: dict[Node, tuple[int, int]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is _ATTENTION:
            query, _, value = (self.env[arg] for arg in n.args[:3] if isinstance(arg, Node))
            if isinstance(query, Tensor) and isinstance(value, Tensor):
                self.found[n] = (int(query.shape[-1]), int(value.shape[-1]))
        return super().run_node(n)


@torch.no_grad()
def widen(module: GraphModule, inputs: Args) -> GraphModule:
    """Pad V where it is narrower than Q; `module` itself if nowhere. Its copy else."""
    if all(node.target is not _ATTENTION for node in module.graph.nodes):
        return module
    wide = copy.deepcopy(module)
    runner = _Widths(wide)
    runner.run(*pytree.tree_leaves(inputs))
    narrow_ones = {n: widths for n, widths in runner.found.items() if widths[1] < widths[0]}
    if not narrow_ones:
        return module
    for node, (query, value) in narrow_ones.items():
        _pad(wide, node, query, value)
    wide.graph.lint()
    wide.recompile()
    return wide


def _pad(module: GraphModule, node: Node, query: int, value: int) -> None:
    """The slice takes the name of the attention, as it has its value."""
    graph, name = module.graph, node.name
    source = node.args[2]
    with graph.inserting_before(node):
        padded = graph.call_function(aten.constant_pad_nd.default, (source, [0, query - value]))
        args = (*node.args[:2], padded, *node.args[3:])
        made = graph.call_function(_ATTENTION, args, dict(node.kwargs))
        cut = graph.call_function(aten.slice.Tensor, (made, -1, 0, value))
    cut.meta = dict(node.meta) | {_MARK: True}
    node.replace_all_uses_with(cut)
    graph.erase_node(node)
    cut.name = name  # free since the erasure; the namespace does not know


def narrow(module: GraphModule) -> GraphModule:
    """A copy without the padding of `widen`."""
    plain = copy.deepcopy(module)
    for cut in [node for node in plain.graph.nodes if node.meta.get(_MARK)]:
        made = cut.args[0]
        padded = made.args[2]
        made.update_arg(2, padded.args[0])
        cut.replace_all_uses_with(made)
        for gone in (cut, padded):
            plain.graph.erase_node(gone)
    plain.graph.lint()
    plain.recompile()
    return plain
