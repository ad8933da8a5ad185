"""rewrite: a copy of the graph in which removed units no longer exist.

Parameters and buffers are index-selected by their labels; constants that carry removed labels are
gathered; sizes that are burned into the graph (reshape, expand, slice bounds, split, pad, groups,
normalized_shape) are recomputed from the labels of the node (passes/edits.py); the softmax scale
of attention stays the dense one. Nothing else is touched.
"""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .choices import never
from .constants import rejoin
from .edit import Edit, hold, register
from .edits import EDITS
from .errors import UnsupportedOp, where
from .removal import Cuts, Removal, count, is_constant, nodes_by_name, places, removal, sliced
from .skeleton import shared_copy
from .values import Mark
from .visit import bind, op_name

__all__ = [
    "Cuts",
    "Removal",
    "attribute",
    "masked",
    "nodes_by_name",
    "removal",
    "rewrite",
    "shrink",
    "shrink_node",
    "sliced",
]
aten = torch.ops.aten
Holders = dict[int, list[tuple[dict[str, Any], str]]]


def rewrite(module: GraphModule, cut: Removal, share: bool = False) -> GraphModule:
    """The compact graph. `module` holds dense (already repaired) weights and stays as it is;
    `share`: both hold the same weights where nothing is cut.
    """
    compact = shared_copy(module) if share else copy.deepcopy(module)
    for node, error in shrink(compact, cut).items():
        raise UnsupportedOp(
            f"{error} · {where(node)} · help: another sparsity, min_keep or align may avoid "
            "it; please report it with the model"
        ) from error
    return compact


def shrink(module: GraphModule, cut: Removal) -> dict[Node, UnsupportedOp]:
    """Make a graph compact (in place); the nodes where that cannot be done, and why."""
    holders = _holders(module)
    failed: dict[Node, UnsupportedOp] = {}
    nodes = list(module.graph.nodes)
    nodes.sort(key=lambda node: is_constant(cut.value(node.name)))  # edits read them uncut
    for node in nodes:
        try:
            shrink_node(module, node, cut, holders)
        except UnsupportedOp as error:
            failed[node] = error
    if failed:
        return failed
    rejoin(module)
    module.graph.lint()
    module.recompile()
    return failed


def shrink_node(module: GraphModule, node: Node, cut: Removal, holders: Holders) -> None:
    """Edit one node, where something is cut off what it reads or makes."""
    if node.op not in ("get_attr", "call_function"):
        return
    if is_constant(cut.value(node.name)):
        _gather_constant(module, node, cut)
    elif node.op == "get_attr":
        _slice_attribute(module, str(node.target), cut.cuts(node.name), holders)
    elif edit := EDITS.get(op_name(node)):
        outs = [cut.cuts(node.name, slot) for slot in range(cut.results(node.name))]
        ins = {arg: cut.cuts(arg.name) for arg in node.all_input_nodes}
        if any(ins.values()) or any(outs):
            edit(Edit(module, node, ins, outs, cut))


def _holders(module: GraphModule) -> Holders:
    """Of each tensor of a module: the tables that hold it, and under which names."""
    found: Holders = defaultdict(list)
    for holder in module.modules():
        for table in (holder._parameters, holder._buffers, vars(holder)):
            for key, held in table.items():
                if isinstance(held, Tensor):
                    found[id(held)].append((table, key))
    return found


def _slice_attribute(module: GraphModule, target: str, cuts: Cuts, holders: Holders) -> None:
    """Slice a parameter, a buffer or a plain tensor under all the names that it has."""
    old = attribute(module, target)
    if not cuts or id(old) not in holders:  # or it was sliced under another name
        return
    new: Tensor = sliced(old.detach(), cuts).clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    for table, key in holders.pop(id(old)):
        table[key] = new


def _gather_constant(module: GraphModule, node: Node, cut: Removal) -> None:
    """What labelled data meets is gathered; other constants read the whole."""
    users = [user for user in node.users if not is_constant(cut.value(user.name))]
    last = node
    for dim, mask in cut.cuts(node.name).items():
        if mask.numel() != mask.shape[dim]:
            raise UnsupportedOp("a constant would be cut block by block")
        last = _gather(module, last, dim, mask.reshape(-1), f"_kept_{node.name}_{dim}")
    if last is not node:
        for user in users:
            user.replace_input_with(node, last)


def _gather(module: GraphModule, node: Node, dim: int, mask: Tensor, name: str) -> Node:
    """What stays along a dim. Where it repeats (heads in each sequence of a batch), it is taken
    from each repetition, however many there are.
    """
    size = len(mask)
    periods = [n for n in range(1, size) if size % n == 0 and (mask.view(-1, n) == mask[:n]).all()]
    period = min(periods, default=size)
    register(module, name, torch.nonzero(mask[:period]).reshape(-1))
    with module.graph.inserting_before(node.next):
        held = module.graph.get_attr(name)
        if period == size:
            return module.graph.call_function(aten.index_select.default, (node, dim, held))
        apart = module.graph.call_function(aten.unflatten.int, (node, dim, [-1, period]))
        left = module.graph.call_function(aten.index_select.default, (apart, dim + 1, held))
        return module.graph.call_function(aten.flatten.using_ints, (left, dim, dim + 1))


def masked(module: GraphModule, cut: Removal) -> GraphModule:
    """The dense graph in which every removed label is zero where it is summed away (1_K at
    each site).
    """
    dense = copy.deepcopy(module)
    nodes, restricted = nodes_by_name(dense.graph.nodes), _restricted(cut)
    mixing = {name for name, mark in restricted.items() if mark.kind != "routed"}
    masks: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for number, layer in enumerate(cut.deps.layers):
        for site in layer.labels.sites:
            if site.node.name in mixing:
                continue
            side = ([o for o in site.operands if o.data] or list(site.operands))[0]
            keep = _keep(cut, side.node.name, side.dim, number)
            if keep is not None:
                held = masks.setdefault((site.node.name, side.node.name), {})
                held[side.dim, number] = keep
    for number, ((name, operand), held) in enumerate(masks.items()):
        _zero(dense, nodes[name], nodes[operand], list(held.values()), f"_mask_{number}")
    for name in (name for name in restricted if name not in mixing):
        _exclude(dense, nodes[name], cut, restricted[name].node)  # type: ignore[arg-type]
    for name in reversed([name for name in nodes if name in mixing]):
        _restrict(dense, nodes[name], cut)  # later nodes first: they still read dense ones
    dense.recompile()
    return dense


def _restricted(cut: Removal) -> dict[str, Mark]:
    """Nodes that mix an axis of which something is removed, or choose among its positions: a mark
    of each.
    """
    found: dict[str, Mark] = {}
    for number, layer in enumerate(cut.deps.layers):
        for mark in layer.labels.marks:
            if mark.node is None or mark.kind not in ("mixed", "mean", "routed"):
                continue
            gone = cut.uncounted if mark.kind == "mean" else cut.gone
            if gone[number][layer.component[mark.labels.numpy()]].any():
                found[mark.node.name] = mark
    return found


def _exclude(module: GraphModule, node: Node, cut: Removal, choice: Node) -> None:
    """A choice never falls on what is removed: -inf there (1_K of a maximum), or infinity."""
    source = node.args[0]
    assert isinstance(source, Node)
    shape = cut.value(source.name).shape
    dim = bind(node, node.args, node.kwargs).get("dim")
    dim = (-1 if dim is None else dim) % len(shape)
    barred = torch.zeros([1] * len(shape), dtype=torch.bool)
    for layer in range(len(cut.gone)):
        barred = barred | ~cut.mask(cut.value(source.name, layer=layer).arrays[dim], layer)
    held = hold(module, node, f"_barred_{node.name}", barred)
    with module.graph.inserting_before(node):
        score = never(choice, shape)
        made = module.graph.call_function(aten.masked_fill.Scalar, (source, held, score))
        made.meta = dict(source.meta)
    node.args = (made, *node.args[1:])


def _restrict(module: GraphModule, node: Node, cut: Removal) -> None:
    """A mixing op sees only what stays; its result is scattered back, zero where it has nothing."""
    outs = [cut.cuts(node.name, slot) for slot in range(cut.results(node.name))]
    if len(outs) > 1 and any(outs):
        raise UnsupportedOp(f"{op_name(node)} mixes an axis of several results · {where(node)}")
    ins, target = {arg: cut.cuts(arg.name) for arg in node.all_input_nodes}, node.target
    if edit := EDITS.get(op_name(node)):
        edit(Edit(module, node, ins, outs, cut))
    reader = node if node.target is target else node.all_input_nodes[0]  # the edit added a factor
    users = list(node.users)
    graph = module.graph
    for arg, cuts in ins.items():
        short = arg
        for dim, mask in cuts.items():
            index = hold(module, reader, f"_in_{node.name}_{arg.name}_{dim}", places(mask, dim))
            with graph.inserting_before(reader):
                short = graph.call_function(aten.take_along_dim.default, (short, index, dim))
        reader.replace_input_with(arg, short)
    wide, after = node, node.next
    for dim, mask in reversed(outs[0].items()):
        back = torch.where(mask, mask.cumsum(dim) - 1, count(mask, dim))
        index = hold(module, after, f"_out_{node.name}_{dim}", back)
        with graph.inserting_before(after):
            zero = graph.call_function(aten.narrow.default, (wide, dim, 0, 1))
            zero = graph.call_function(aten.mul.Scalar, (zero, 0.0))
            joined = graph.call_function(aten.cat.default, ([wide, zero], dim))
            wide = graph.call_function(aten.take_along_dim.default, (joined, index, dim))
    for user in users:
        user.replace_input_with(node, wide)


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
