"""rewrite: a copy of the graph in which removed units no longer exist.

Parameters and buffers are index-selected by their labels; constants that carry removed labels are
gathered; sizes that
are burned into the graph (reshape, expand, slice, split, pad, groups, normalized_shape) are
recomputed from the labels
of the node; the softmax scale of attention stays the dense one. Nothing else is touched.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .couple import DependencyGraph
from .errors import UnsupportedOp, where
from .labels import Value, _bind, _op_name

Cuts = dict[int, Tensor]
aten = torch.ops.aten


@dataclass(frozen=True)
class Removal:
    """Which units are gone, as a mask over components."""

    deps: DependencyGraph
    gone: np.ndarray

    def cuts(self, value: Any) -> Cuts:
        """Per compacted dim of a value with removed labels: the mask of what stays
        (broadcasts to the value).
        """
        if not isinstance(value, Value):
            return {}
        masks = {
            d: torch.from_numpy(~self.gone[self.deps.component[a.numpy()]])
            for d, a in value.arrays.items()
        }
        return {d: mask for d, mask in masks.items() if not bool(mask.all())}


def removal(deps: DependencyGraph, kept: Mapping[str, tuple[int, ...]]) -> Removal:
    """The units of each group of `kept` that are not kept are gone."""
    gone = np.zeros(int(deps.component.max()) + 1, bool)
    for name, units in kept.items():
        components = np.asarray(deps[name].components)
        gone[components] = True
        gone[components[list(units)]] = False
    return Removal(deps, gone)


def sliced(tensor: Tensor, cuts: Cuts) -> Tensor:
    """`tensor` without what the cuts remove; every block keeps the same number, so the result
    is rectangular.
    """
    for dim, mask in cuts.items():
        size = count(mask, dim)
        order = (~mask).to(torch.int8).argsort(dim=dim, stable=True).narrow(dim, 0, size)
        shape = [tensor.shape[k] if k != dim else size for k in range(tensor.dim())]
        if order.numel() == order.shape[dim]:
            tensor = tensor.index_select(dim, order.reshape(-1).to(tensor.device))
        else:
            tensor = tensor.gather(dim, order.expand(shape).to(tensor.device))
    return tensor


def count(mask: Tensor, dim: int) -> int:
    """How many stay along `dim`; the same in every block, or UnsupportedOp."""
    sizes = torch.unique(mask.sum(dim))
    if len(sizes) != 1:
        raise UnsupportedOp(f"blocks would keep unequal numbers of units: {sizes.tolist()}")
    return int(sizes[0])


def rewrite(module: GraphModule, cut: Removal) -> GraphModule:
    """The compact graph. `module` holds dense (already repaired) weights and stays as it is."""
    compact = copy.deepcopy(module)
    values = {node.name: value for node, value in cut.deps.labels.values.items()}
    for node in list(compact.graph.nodes):
        value = values.get(node.name)
        try:
            _rewrite_node(compact, node, value, cut, values)
        except UnsupportedOp as error:
            raise UnsupportedOp(f"{error} · {where(node)}") from error
    compact.graph.lint()
    compact.recompile()
    return compact


def _rewrite_node(
    module: GraphModule, node: Node, value: Any, cut: Removal, values: Mapping[str, Any]
) -> None:
    if node.op == "get_attr":
        _slice_attribute(module, str(node.target), cut.cuts(value))
    elif node.op == "call_function" and isinstance(value, Value) and value.const is not None:
        _gather_constant(module, node, cut.cuts(value), values)
    elif node.op == "call_function":
        edit = EDITS.get(_op_name(node))
        outs = value if isinstance(value, list) else [value]
        ins = {arg: cut.cuts(values.get(arg.name)) for arg in node.all_input_nodes}
        if edit and (any(ins.values()) or any(cut.cuts(v) for v in outs)):
            edit(Edit(module, node, ins, [cut.cuts(v) for v in outs], values, cut))
        elif isinstance(value, Value) and "batch_norm" not in _op_name(node):
            _trim_broadcast(node, value, cut, values)


def _slice_attribute(module: GraphModule, target: str, cuts: Cuts) -> None:
    if not cuts:
        return
    path, _, name = target.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, name)
    if getattr(old, "_fasp_cut", False):
        return
    new: Tensor = sliced(old.detach(), cuts).clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    new._fasp_cut = True  # type: ignore[attr-defined]
    for holder in module.modules():
        for table in (holder._parameters, holder._buffers):
            for key, held in list(table.items()):
                if held is old:
                    table[key] = new  # type: ignore[assignment]


def _gather_constant(
    module: GraphModule, node: Node, cuts: Cuts, values: Mapping[str, Any]
) -> None:
    users = [u for u in node.users if getattr(values.get(u.name), "const", None) is None]
    last = node
    for dim, mask in cuts.items():
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


def _trim_broadcast(node: Node, value: Value, cut: Removal, values: Mapping[str, Any]) -> None:
    """An operand that is constant along a cut dim (an expand) is narrowed."""
    if "pointwise" not in str(getattr(node.target, "tags", ())):
        return
    rank = len(value.shape)
    for dim, mask in cut.cuts(value).items():
        for arg in node.all_input_nodes:
            held = values.get(arg.name)
            if not isinstance(held, Value):
                continue
            own = dim - rank + len(held.shape)
            if own >= 0 and held.shape[own] > 1 and own not in held.arrays:
                with node.graph.inserting_before(node):
                    short = node.graph.call_function(
                        aten.slice.Tensor, (arg, own, 0, count(mask, dim))
                    )
                node.replace_input_with(arg, short)


# -------------------------------------------------------------------- edits of burned-in sizes
@dataclass(frozen=True)
class Edit:
    """One node to edit: the cuts of its inputs and outputs."""

    module: GraphModule
    node: Node
    ins: Mapping[Node, Cuts]
    outs: list[Cuts]
    values: Mapping[str, Any]
    removal: Removal

    def bound(self) -> dict[str, Any]:
        """Arguments by schema name."""
        return _bind(self.node, (self.node.args, self.node.kwargs))

    def source(self) -> Node:
        """The tensor that the op moves."""
        source = self.node.all_input_nodes[0]
        first = self.node.args[0]
        return first if isinstance(first, Node) else source

    def call(self, target: Any, *args: Any) -> None:
        """Change the node's op and arguments."""
        self.node.target, self.node.args, self.node.kwargs = target, args, {}

    def positions(self, dim: int, old: list[int]) -> list[int]:
        """Where the kept ones among the old positions along `dim` of the source are now."""
        mask = self.ins[self.source()].get(dim)
        if mask is None:
            return old
        rows = mask.movedim(dim, -1).reshape(-1, mask.shape[dim])
        moved = [[int(n) - 1 for n in row.cumsum(0)[old][row[old]]] for row in rows]
        if any(row != moved[0] for row in moved):
            raise UnsupportedOp(
                f"{self.node.target} would take different places in different blocks"
            )
        return moved[0]


def _reshape(edit: Edit) -> None:
    bound = edit.bound()
    key = "shape" if "shape" in bound else "size"
    sizes = list(bound[key])
    for dim, mask in edit.outs[0].items():
        sizes[dim] = count(mask, dim)
    edit.node.args = (edit.source(), sizes)
    edit.node.kwargs = {}


def _expand(edit: Edit) -> None:
    bound = edit.bound()
    sizes = list(bound["size"])
    for dim, mask in edit.outs[0].items():
        sizes[dim] = count(mask, dim)
    edit.node.args = (edit.source(), sizes)
    edit.node.kwargs = {}


def _unflatten(edit: Edit) -> None:
    bound = edit.bound()
    value = edit.values[edit.source().name]
    start = bound["dim"] % len(value.shape)
    sizes = list(bound["sizes"])
    for dim, mask in edit.outs[0].items():
        if start <= dim < start + len(sizes):
            sizes[dim - start] = count(mask, dim)
    edit.call(edit.node.target, edit.source(), bound["dim"], sizes)


def _slice(edit: Edit) -> None:
    bound, value = edit.bound(), edit.values[edit.source().name]
    dim = (bound["dim"] or 0) % len(value.shape)
    if dim not in edit.ins[edit.source()]:
        return
    size = value.shape[dim]
    old = list(range(size))[slice(bound["start"], bound["end"], bound["step"])]
    new = edit.positions(dim, old)
    steps = set(np.diff(new).tolist())
    if len(steps) > 1:
        raise UnsupportedOp("a strided slice would become irregular")
    step = steps.pop() if steps else 1
    start = new[0] if new else 0
    edit.call(edit.node.target, edit.source(), dim, start, (new[-1] + 1) if new else 0, step)


def _select(edit: Edit) -> None:
    bound, value = edit.bound(), edit.values[edit.source().name]
    dim = bound["dim"] % len(value.shape)
    if dim in edit.ins[edit.source()]:
        (new,) = edit.positions(dim, [bound["index"] % value.shape[dim]])
        edit.call(edit.node.target, edit.source(), dim, new)


def _split(edit: Edit) -> None:
    bound, value = edit.bound(), edit.values[edit.source().name]
    dim = bound["dim"] % len(value.shape)
    mask = edit.ins[edit.source()].get(dim)
    if mask is None:
        return
    parts = [part.shape[dim] for part in edit.values[edit.node.name]]
    sizes = [count(piece, dim) for piece in mask.split(parts, dim)]
    edit.call(aten.split_with_sizes.default, edit.source(), sizes, dim)


def _index(edit: Edit) -> None:
    """Indexing by a constant along a cut dim: the constant is recomputed."""
    bound = edit.bound()
    indices = bound["indices"] if "indices" in bound else [None] * bound["dim"] + [bound["index"]]
    cuts = edit.ins[edit.source()]
    indexed = [d for d, index in enumerate(indices) if isinstance(index, Node)]
    if not set(indexed) & set(cuts):
        return
    const = edit.values[indices[indexed[0]].name].const
    if len(indexed) > 1 or const is None or const.dim() != 1:
        raise UnsupportedOp(
            f"{edit.node.target} indexes a pruned axis in a way that cannot be rewritten"
        )
    new = torch.tensor(edit.positions(indexed[0], const.tolist()), dtype=torch.long)
    name = f"_index_{edit.node.name}"
    edit.module.register_buffer(name, new, persistent=False)
    with edit.node.graph.inserting_before(edit.node):
        held = edit.node.graph.get_attr(name)
    edit.call(aten.index_select.default, edit.source(), indexed[0], held)


def _pad(edit: Edit) -> None:
    bound = edit.bound()
    value = edit.values[edit.source().name]
    pads = list(bound["pad"])
    for dim, mask in edit.outs[0].items():
        k = 2 * (len(value.shape) - 1 - dim)
        if k >= len(pads) or not (pads[k] or pads[k + 1]):
            continue
        flat = mask.reshape(-1)
        pads[k], pads[k + 1] = (
            int(flat[: pads[k]].sum()),
            int(flat[len(flat) - pads[k + 1] :].sum()),
        )
    edit.node.args = (edit.source(), pads, *edit.node.args[2:])


def _convolution(edit: Edit) -> None:
    bound = edit.bound()
    weight = edit.values[bound["weight"].name]
    groups = bound.get("groups", 1)
    if groups == 1 or weight.shape[1] != 1:
        return
    x = edit.values[bound["input"].name]
    channel = len(x.shape) - len(weight.shape) + 1
    mask = edit.ins[bound["input"]].get(channel)
    if mask is not None:
        names = list(bound)
        args = [bound[n] for n in names]
        args[names.index("groups")] = count(mask, channel)
        edit.call(edit.node.target, *args)


def _layer_norm(edit: Edit) -> None:
    bound = edit.bound()
    value = edit.values[edit.source().name]
    sizes = list(bound["normalized_shape"])
    for dim, mask in edit.ins[edit.source()].items():
        at = dim - len(value.shape) + len(sizes)
        if at >= 0:
            sizes[at] = count(mask, dim)
    edit.node.args = (edit.node.args[0], sizes, *edit.node.args[2:])


def _attention(edit: Edit) -> None:
    bound = edit.bound()
    query = edit.values[bound["query"].name]
    dim = len(query.shape) - 1
    if dim in edit.ins[bound["query"]] and bound.get("scale") is None:
        edit.node.kwargs = {**edit.node.kwargs, "scale": 1.0 / math.sqrt(query.shape[dim])}


def _unbind(edit: Edit) -> None:
    value = edit.values[edit.source().name]
    if edit.bound()["dim"] % len(value.shape) in edit.ins[edit.source()]:
        raise UnsupportedOp("unbind along a pruned axis")


def _repeat(edit: Edit) -> None:
    """A repeat multiplies whatever is there; the labels have checked that whole copies stay."""


EDITS: dict[str, Any] = {
    "reshape": _reshape,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "expand": _expand,
    "unflatten": _unflatten,
    "slice": _slice,
    "narrow": _unbind,
    "select": _select,
    "split": _split,
    "split_with_sizes": _split,
    "chunk": _split,
    "unbind": _unbind,
    "roll": _unbind,
    "index": _index,
    "index_select": _index,
    "constant_pad_nd": _pad,
    "pad": _pad,
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
}
del EDITS["narrow"], EDITS["roll"]


def masked(module: GraphModule, cut: Removal) -> GraphModule:
    """The dense graph in which every removed label is zero where it is summed away (1_K at
    each site).
    """
    dense = copy.deepcopy(module)
    nodes = {node.name: node for node in dense.graph.nodes}
    done: set[tuple[str, str, int]] = set()
    for site in cut.deps.labels.sites:
        data = [o for o in site.operands if o.data] or list(site.operands)
        value = cut.deps.labels.values[data[0].node]
        key = (site.node.name, data[0].node.name, data[0].dim)
        mask = cut.cuts(value).get(data[0].dim)
        if mask is None or key in done:
            continue
        done.add(key)
        name = f"_mask_{len(done)}"
        dense.register_buffer(name, mask.to(value.fake.dtype), persistent=False)
        node = nodes[site.node.name]
        with dense.graph.inserting_before(node):
            held = dense.graph.get_attr(name)
            zeroed = dense.graph.call_function(aten.mul.Tensor, (nodes[data[0].node.name], held))
        node.args = pytree.tree_map(
            lambda a, o=nodes[data[0].node.name], z=zeroed: z if a is o else a,
            node.args,
            is_leaf=lambda a: isinstance(a, Node),
        )
    dense.recompile()
    return dense


def attribute(module: nn.Module, target: str) -> Any:
    """The parameter or buffer at a dotted path."""
    return operator.attrgetter(target)(module)
