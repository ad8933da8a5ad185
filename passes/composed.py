"""composed: an op without a rule that torch itself composes of others is taken apart.

    cosine_similarity(x, y)  ->  norms, divisions, a product and a sum

What is taken apart must compute what the op computed: capture compares with the model.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from . import indexing, made, moves, pairs, places, recurrent, routing, windows
from .fakes import unknowns
from .pointwise import is_pointwise
from .rules import table
from .visit import op_name
from .vmapped import trace_again

SPECIAL = tuple(m.HANDLERS for m in (places, indexing, routing, recurrent, pairs, windows, made))
"""Ops whose labels are a function of their own."""
COMPOSED = torch._C.DispatchKey.CompositeImplicitAutograd
DECOMPOSED = get_decompositions([torch.ops.aten.channel_shuffle])
"""Ops with a kernel of their own that torch also knows how to compose."""


def take_apart(module: GraphModule) -> GraphModule:
    """`module` without composed ops that the analysis knows nothing of (in place)."""
    rules = table()
    for node in list(module.graph.nodes):
        name = op_name(node).rstrip("_")
        known = name in rules or name in moves.MOVEMENT or any(name in held for held in SPECIAL)
        if not known and _is_composed(node) and not is_pointwise(node):
            with contextlib.suppress(Exception):  # an op may refuse to be traced in any way
                trace_again(module, [node], DECOMPOSED)
    return module


def _is_composed(node: Node) -> bool:
    """Whether torch has no kernel of its own for a call (or one of no need), whose results have
    sizes that are known before.
    """
    if not isinstance(node.target, torch._ops.OpOverload) or not node.all_input_nodes:
        return False
    leaves = pytree.tree_leaves(node.meta.get("val"))
    tensors = bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)
    if not tensors or node.target._schema.is_mutable or unknowns(leaves):
        return False
    return node.target in DECOMPOSED or node.target.has_kernel_for_dispatch_key(COMPOSED)
