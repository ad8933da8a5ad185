"""kernels: the same numbers in shapes and layouts that fast kernels take.

    attention(q, k, v) = attention(q, k, [v, 0]) without its last columns
    attention(q, k, v) = attention(clone(q), clone(k), v)
    attention(q, k, v, tril) = attention(q, k, v, is_causal)

Where V is narrower than Q and K, torch's attention has no fused kernel and falls back to one that
writes the whole matrix of attention weights. V is padded with zeros to the width of Q, and the
zeros are cut off the result. Where Q, K and V are parts of one product of odd width, their rows
begin at odd places, which GPU kernels refuse; such parts are copied first. `narrow` undoes both for
runtimes that do not mind. A causal mask that is written out is computed with like any other; told
that it is one, kernels leave out the half that it hides.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .skeleton import shared_copy
from .state import steady

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default
_MARK = "padded_value"
_COPIED = "copied_rows"
_ROWS = 8  # elements: rows that begin at multiples of 16 bytes in any precision


def told_causal(node: Node, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The arguments of a call; of an attention, `is_causal` in place of a mask that is the causal
    one in all rows.
    """
    mask = args[3] if node.target is _ATTENTION and len(args) == 4 else None
    if (
        mask is None
        or kwargs.keys() - {"scale", "enable_gqa"}
        or not _is_causal(args[0], args[1], mask)
    ):
        return args, kwargs
    return args[:3], {**kwargs, "is_causal": True}


def _is_causal(query: Tensor, key: Tensor, mask: Tensor) -> bool:
    tokens = query.shape[-2]
    if mask.dtype != torch.bool or key.shape[-2] != tokens or mask.shape[-2:] != (tokens, tokens):
        return False
    own = mask[tuple(slice(1 if step == 0 else None) for step in mask.stride()[:-2])]
    return torch.equal(own, torch.ones_like(own).tril())


class _Operands(Interpreter):
    """Runs a graph and notes, at each attention, the last dims of Q and V where V is narrower, and
    which operands have rows that begin at odd places.
    """

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.widths: dict[Node, tuple[int, int]] = {}
        self.odd: dict[Node, list[Node]] = {}

    def run_node(self, n: Node) -> Any:
        if n.target is _ATTENTION:
            operands = {arg: self.env[arg] for arg in n.args[:3] if isinstance(arg, Node)}
            query, value = (self.env[arg] for arg in (n.args[0], n.args[2]))
            if query.shape[-1] > value.shape[-1]:
                self.widths[n] = (int(query.shape[-1]), int(value.shape[-1]))
                operands.pop(n.args[2])  # padding copies it
            self.odd[n] = [arg for arg, held in operands.items() if _odd(held)]
        return super().run_node(n)


def _odd(value: Any) -> bool:
    """Whether rows are parts of wider ones, and begin where rows of their own would not."""
    if not isinstance(value, Tensor) or value.is_contiguous():
        return False
    unit = math.gcd(value.shape[-1], _ROWS)
    return any(stride % unit for stride in value.stride()[:-1])


@torch.no_grad()
def widen(module: GraphModule, inputs: Args) -> GraphModule:
    """Pad V where it is narrower than Q, copy operands with odd rows; `module` itself if nowhere.
    Its copy else.
    """
    if all(node.target is not _ATTENTION for node in module.graph.nodes):
        return module
    wide = copy.deepcopy(module)
    runner = _Operands(wide)
    with steady(wide):
        runner.run(*pytree.tree_leaves(inputs))
    if not runner.widths and not any(runner.odd.values()):
        return module
    for node, operands in runner.odd.items():
        for operand in operands:
            _copy(wide, node, operand)
    for node, (query, value) in runner.widths.items():
        _pad(wide, node, query, value)
    wide.graph.lint()
    wide.recompile()
    return wide


def _copy(module: GraphModule, node: Node, operand: Node) -> None:
    with module.graph.inserting_before(node):
        layout = {"memory_format": torch.contiguous_format}
        own = module.graph.call_function(aten.clone.default, (operand,), layout)
    own.meta = dict(operand.meta) | {_COPIED: True}
    node.replace_input_with(operand, own)


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
    """A copy without the padding and the copies of `widen`, on the same weights."""
    plain = shared_copy(module)
    for own in [node for node in plain.graph.nodes if node.meta.get(_COPIED)]:
        own.replace_all_uses_with(own.args[0])
        plain.graph.erase_node(own)
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
