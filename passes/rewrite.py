"""rewrite: a copy of the graph in which removed units no longer exist.

Parameters and buffers are index-selected by their labels; constants that carry removed labels are
gathered; sizes that are burned into the graph (reshape, expand, slice bounds, split, pad, groups,
normalized_shape) are recomputed from the labels of the node (passes/edits.py); the softmax scale
of attention stays the dense one. Nothing else is touched.
"""

from __future__ import annotations

import copy
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .edits import EDITS, Edit, hold
from .errors import UnsupportedOp, where
from .removal import Cuts, Removal, is_constant, nodes_by_name, removal, sliced
from .visit import op_name

__all__ = [
    "Cuts",
    "Removal",
    "attribute",
    "masked",
    "nodes_by_name",
    "removal",
    "rewrite",
    "sliced",
]
aten = torch.ops.aten


def rewrite(module: GraphModule, cut: Removal) -> GraphModule:
    """The compact graph. `module` holds dense (already repaired) weights and stays as it is."""
    compact = copy.deepcopy(module)
    replaced: dict[int, Tensor] = {}
    for node in list(compact.graph.nodes):
        try:
            _rewrite_node(compact, node, cut, replaced)
        except UnsupportedOp as error:
            raise UnsupportedOp(f"{error} · {where(node)}") from error
    compact.graph.lint()
    compact.recompile()
    return compact


def _rewrite_node(
    module: GraphModule, node: Node, cut: Removal, replaced: dict[int, Tensor]
) -> None:
    if node.op not in ("get_attr", "call_function"):
        return
    if is_constant(cut.value(node.name)):
        _gather_constant(module, node, cut)
    elif node.op == "get_attr":
        _slice_attribute(module, str(node.target), cut.cuts(node.name), replaced)
    elif edit := EDITS.get(op_name(node)):
        outs = [cut.cuts(node.name, slot) for slot in range(cut.results(node.name))]
        ins = {arg: cut.cuts(arg.name) for arg in node.all_input_nodes}
        if any(ins.values()) or any(outs):
            edit(Edit(module, node, ins, outs, cut))


def _slice_attribute(
    module: GraphModule, target: str, cuts: Cuts, replaced: dict[int, Tensor]
) -> None:
    """Slice a parameter or buffer under all the names that it has."""
    old = attribute(module, target)
    if not cuts or id(old) in replaced:
        return
    new: Tensor = sliced(old.detach(), cuts).clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    replaced[id(new)] = new
    for holder in module.modules():
        for table in (holder._parameters, holder._buffers):
            for key, held in list(table.items()):
                if held is old:
                    table[key] = new  # type: ignore[assignment]


def _gather_constant(module: GraphModule, node: Node, cut: Removal) -> None:
    """What labelled data meets is gathered; other constants read the whole."""
    users = [user for user in node.users if not is_constant(cut.value(user.name))]
    last = node
    for dim, mask in cut.cuts(node.name).items():
        if mask.numel() != mask.shape[dim]:
            raise UnsupportedOp("a constant would be cut block by block")
        index = torch.nonzero(mask.reshape(-1)).reshape(-1)
        name = f"_kept_{node.name}_{dim}"
        module.register_buffer(name, index, persistent=False)
        with module.graph.inserting_after(last):
            held = module.graph.get_attr(name)
        with module.graph.inserting_after(held):
            last = module.graph.call_function(aten.index_select.default, (last, dim, held))
    if last is not node:
        for user in users:
            user.replace_input_with(node, last)


def masked(module: GraphModule, cut: Removal) -> GraphModule:
    """The dense graph in which every removed label is zero where it is summed away (1_K at
    each site).
    """
    dense = copy.deepcopy(module)
    nodes = nodes_by_name(dense.graph.nodes)
    masks: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for number, layer in enumerate(cut.deps.layers):
        for site in layer.labels.sites:
            side = ([o for o in site.operands if o.data] or list(site.operands))[0]
            keep = _keep(cut, side.node.name, side.dim, number)
            if keep is not None:
                held = masks.setdefault((site.node.name, side.node.name), {})
                held[side.dim, number] = keep
    for number, ((name, operand), held) in enumerate(masks.items()):
        _zero(dense, nodes[name], nodes[operand], list(held.values()), f"_mask_{number}")
    dense.recompile()
    return dense


def _keep(cut: Removal, name: str, dim: int, layer: int) -> Tensor | None:
    """The mask of what stays along a dim, None if all does."""
    value = cut.value(name, layer=layer)
    mask = cut.mask(value.arrays[dim], layer)
    return None if bool(mask.all()) else mask.to(value.fake.dtype)


def _zero(module: GraphModule, node: Node, operand: Node, keeps: list[Tensor], name: str) -> None:
    """Multiply one operand of a node by masks."""
    zeroed = operand
    for number, keep in enumerate(keeps):
        held = hold(module, node, f"{name}_{number}", keep)
        with module.graph.inserting_before(node):
            zeroed = module.graph.call_function(aten.mul.Tensor, (zeroed, held))
    node.args = pytree.tree_map(
        lambda a: zeroed if a is operand else a, node.args, is_leaf=lambda a: isinstance(a, Node)
    )


def attribute(module: nn.Module, target: str) -> Any:
    """The parameter or buffer at a dotted path."""
    return operator.attrgetter(target)(module)
