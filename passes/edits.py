"""Edits: sizes that are burned into single nodes, recomputed from what is cut off them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from . import norms
from .edit import Edit, hold
from .errors import UnsupportedOp
from .made import BY_SIZE
from .pointwise import DRAWN_LIKE
from .removal import count, places, take
from .visit import op_name

aten = torch.ops.aten


def _sizes(edit: Edit, key: str, first: int = 0) -> list[Any]:
    sizes = list(edit.bound[key])
    for dim, mask in edit.outs[0].items():
        at = dim - first
        if 0 <= at < len(sizes) and isinstance(sizes[at], Node):
            sizes[at] = _shrunk(edit, sizes[at], Fraction(count(mask, dim), mask.shape[dim]))
        elif 0 <= at < len(sizes) and sizes[at] != -1:
            sizes[at] = count(mask, dim)
    return sizes


def _shrunk(edit: Edit, size: Node, share: Fraction) -> Node:
    """A size that is computed (the batch times heads, say), times the share that stays."""
    graph = edit.node.graph
    with graph.inserting_before(edit.node):
        whole = graph.call_function(operator.mul, (size, share.numerator))
        return graph.call_function(operator.floordiv, (whole, share.denominator))


def _reshape(edit: Edit) -> None:
    key = "shape" if "shape" in edit.bound else "size"
    edit.change(**{key: _sizes(edit, key)})


def _expand(edit: Edit) -> None:
    edit.change(size=_sizes(edit, "size"))


def _unflatten(edit: Edit) -> None:
    start = edit.bound["dim"] % len(edit.shape(edit.source))
    edit.change(sizes=_sizes(edit, "sizes", start))


def _repeat(edit: Edit) -> None:
    """A repeat multiplies what is there; where one place was repeated, fewer copies stay."""
    repeats = list(edit.bound["repeats"])
    shape = edit.shape(edit.source)
    first = len(repeats) - len(shape)
    for dim, mask in edit.outs[0].items():
        if dim < first or shape[dim - first] == 1:
            repeats[dim] = count(mask, dim)
    edit.change(repeats=repeats)


def _repeat_interleave(edit: Edit) -> None:
    shape, dim = edit.shape(edit.source), edit.bound["dim"]
    if dim is None or dim % len(shape) not in edit.outs[0]:
        return
    size, repeats = count(edit.outs[0][dim % len(shape)], dim % len(shape)), edit.bound["repeats"]
    if isinstance(repeats, Node) and shape[dim] > 1:
        times = edit.cut.value(repeats.name).const.expand(shape[dim])
        _take(edit, dim % len(shape), torch.arange(shape[dim]).repeat_interleave(times).tolist())
        return
    if isinstance(repeats, Node):
        edit.become(aten.repeat_interleave.self_int, edit.source, size, dim)
        return
    arguments: dict[str, Any] = {"repeats": size} if shape[dim] == 1 else {}
    if edit.bound.get("output_size") is not None:
        arguments["output_size"] = size
    edit.change(**arguments)


def _slice(edit: Edit) -> None:
    bound, shape = edit.bound, edit.shape(edit.source)
    dim = (bound["dim"] or 0) % len(shape)
    if dim not in edit.ins[edit.source]:
        return
    old = list(range(shape[dim]))[slice(bound["start"], bound["end"], bound["step"])]
    new = edit.positions(dim, old)
    if not old:
        return
    steps = set(np.diff(new).tolist())
    if not new:
        raise UnsupportedOp("nothing would be left of a slice")
    if len(steps) > 1:
        held = hold(edit.module, edit.node, f"_index_{edit.node.name}", torch.tensor(new))
        edit.become(aten.index_select.default, edit.source, dim, held)
        return
    step = steps.pop() if steps else 1
    edit.change(dim=dim, start=new[0], end=new[-1] + 1, step=step)


def _scatter_part(edit: Edit) -> None:
    """What is written stands between what stays before it and behind it: cat, since another
    number of places may be written than stays of those that are overwritten.
    """
    bound, shape = edit.bound, edit.shape(edit.source)
    dim = (bound["dim"] or 0) % len(shape)
    masks = (edit.ins[edit.source].get(dim), edit.outs[0].get(dim))
    if masks == (None, None):
        return
    one = "index" in bound
    at = bound["index"] % shape[dim] if one else 0
    low, high, step = (at, at + 1, 1) if one else _range(bound, shape[dim])
    if step != 1 or any(mask is not None and mask.numel() != mask.shape[dim] for mask in masks):
        raise UnsupportedOp("a write would become irregular")
    before = torch.ones(shape[dim]) if masks[0] is None else masks[0].reshape(-1)
    first, last, end = (int(before[:n].sum()) for n in (low, high, None))
    graph, written = edit.module.graph, bound["src"]
    with graph.inserting_before(edit.node):
        left = graph.call_function(aten.slice.Tensor, (edit.source, dim, 0, first))
        right = graph.call_function(aten.slice.Tensor, (edit.source, dim, last, end))
        if one:
            written = graph.call_function(aten.unsqueeze.default, (written, dim))
    edit.become(aten.cat.default, [left, written, right], dim)


def _range(bound: Mapping[str, Any], size: int) -> tuple[int, int, int]:
    return slice(bound["start"], bound["end"], bound["step"]).indices(size)


def _select(edit: Edit) -> None:
    bound, shape = edit.bound, edit.shape(edit.source)
    dim = bound["dim"] % len(shape)
    if dim in edit.ins[edit.source]:
        (new,) = edit.positions(dim, [bound["index"] % shape[dim]])
        edit.change(dim=dim, index=new)


def _split(edit: Edit) -> None:
    shape = edit.shape(edit.source)
    dim = (edit.bound.get("dim") or 0) % len(shape)
    mask = edit.ins[edit.source].get(dim)
    if mask is None:
        return
    slots = range(edit.cut.results(edit.node.name))
    parts = [edit.cut.value(edit.node.name, slot).shape[dim] for slot in slots]
    sizes = [count(piece, dim) if piece.numel() else 0 for piece in mask.split(parts, dim)]
    edit.become(aten.split_with_sizes.default, edit.source, sizes, dim)


def _index(edit: Edit) -> None:
    """Indexing by a constant along a cut dim: the constant is recomputed."""
    bound, rank = edit.bound, len(edit.shape(edit.source))
    indices = bound.get("indices") or [None] * (bound["dim"] % rank) + [bound["index"]]
    cuts = edit.ins[edit.source]
    indexed = [d for d, index in enumerate(indices) if isinstance(index, Node)]
    if not set(indexed) & set(cuts) or edit.cut.value(indices[indexed[0]].name).const is None:
        return
    const = edit.cut.value(indices[indexed[0]].name).const
    if len(indexed) > 1 or const.dim() != 1:
        raise UnsupportedOp("an index table of several dims points at a pruned axis")
    _take(edit, indexed[0], const.tolist())


def _take(edit: Edit, dim: int, places: list[int]) -> None:
    """Old places along a dim of the source, where they are now."""
    new = torch.tensor(edit.positions(dim, places), dtype=torch.long)
    held = hold(edit.module, edit.node, f"_index_{edit.node.name}", new)
    edit.become(aten.index_select.default, edit.source, dim, held)


def _roll(edit: Edit) -> None:
    """A roll of a cut dim takes what stays in the order of the dense roll."""
    rank, cuts, shifts = len(edit.shape(edit.source)), edit.ins[edit.source], edit.bound["shifts"]
    dims = [dim % rank for dim in edit.bound["dims"]]
    if cuts.keys().isdisjoint(dims):
        return
    if len(dims) > 1 or not isinstance(shifts[0], int):
        raise UnsupportedOp("a pruned axis is rolled with others, or by a size")
    (dim,), (shift,) = dims, shifts
    number = cuts[dim].cumsum(dim) - 1
    index = take(number.roll(shift, dim), dim, cuts[dim].roll(shift, dim))
    held = hold(edit.module, edit.node, f"_rolled_{edit.node.name}", index)
    edit.become(aten.take_along_dim.default, edit.source, held, dim)


def _pad(edit: Edit) -> None:
    pads, rank = list(edit.bound["pad"]), len(edit.shape(edit.source))
    for dim, mask in edit.outs[0].items():
        k = 2 * (rank - 1 - dim)
        if k < len(pads) and (pads[k] or pads[k + 1]):
            flat = mask.reshape(-1)
            last = len(flat) - pads[k + 1]
            pads[k], pads[k + 1] = int(flat[: pads[k]].sum()), int(flat[last:].sum())
    edit.change(pad=pads)


def _convolution(edit: Edit) -> None:
    """A depthwise convolution has as many groups as channels."""
    weight, shape = edit.shape(edit.bound["weight"]), edit.shape(edit.bound["input"])
    channel, groups = len(shape) - len(weight) + 1, edit.bound.get("groups", 1)
    if groups == 1 or groups != shape[channel]:
        return
    mask = edit.ins[edit.bound["input"]].get(channel)
    if mask is not None:
        edit.change(groups=count(mask, channel))


def _attention(edit: Edit) -> None:
    """The softmax scale stays 1 / sqrt of the dense head size."""
    query = edit.bound["query"]
    size = edit.shape(query)[-1]
    if len(edit.shape(query)) - 1 in edit.ins[query] and edit.bound.get("scale") is None:
        edit.change(scale=1.0 / math.sqrt(size))


def _one_hot(edit: Edit) -> None:
    last = len(edit.shape(edit.source))
    if last in edit.outs[0]:
        edit.change(num_classes=count(edit.outs[0][last], last))


def _drawn(edit: Edit) -> None:
    """As many numbers are drawn as before; those that stay are taken."""
    graph, shape, cuts = edit.node.graph, edit.shape(edit.node), edit.outs[0]
    held = {
        d: hold(edit.module, edit.node, f"_drawn_{edit.node.name}_{d}", places(mask, d))
        for d, mask in cuts.items()
    }
    with graph.inserting_before(edit.node):
        wide = edit.source
        for dim in cuts:
            wide = graph.call_function(aten.narrow.default, (wide, dim, 0, 1))
        sizes = [size if dim in cuts else -1 for dim, size in enumerate(shape)]
        wide = graph.call_function(aten.expand.default, (wide, sizes))
        options = {**edit.node.kwargs, "memory_format": torch.contiguous_format}
        made = graph.call_function(edit.node.target, (wide, *edit.node.args[1:]), options)
        *before, (last, index) = held.items()
        for dim, kept in before:
            made = graph.call_function(aten.take_along_dim.default, (made, kept, dim))
    edit.become(aten.take_along_dim.default, made, index, last)


def _made_like(edit: Edit) -> None:
    """Made by size, where other places stay than in the form."""
    graph, node, form = edit.node.graph, edit.node, edit.ins[edit.source]
    out, there = ({d: count(m, d) for d, m in cuts.items()} for cuts in (edit.outs[0], form))
    if out == there:
        return
    with graph.inserting_before(node):
        sizes = [
            out.get(dim, size)
            if dim in {*out, *there}
            else graph.call_function(aten.sym_size.int, (edit.source, dim))
            for dim, size in enumerate(edit.shape(edit.source))
        ]
    filled = [edit.bound["fill_value"]] if "fill_value" in edit.bound else []
    options = {k: v for k, v in node.kwargs.items() if k not in ("memory_format", "fill_value")}
    edit.become(BY_SIZE[op_name(node)], edit.source, sizes, *filled)
    node.kwargs = options


EDITS: dict[str, Callable[[Edit], None]] = {
    **dict.fromkeys(("reshape", "view", "_unsafe_view"), _reshape),
    **dict.fromkeys(("expand", "broadcast_to"), _expand),
    "unflatten": _unflatten,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "slice": _slice,
    "select": _select,
    "one_hot": _one_hot,
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scatter_part),
    **dict.fromkeys(
        ("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_split", "unsafe_chunk"),
        _split,
    ),
    **dict.fromkeys(("index", "index_select"), _index),
    "roll": _roll,
    **dict.fromkeys(("constant_pad_nd", "pad"), _pad),
    "layer_norm": norms.normalized,
    "rms_norm": norms.rms_norm,
    "mean": norms.mean,
    **dict.fromkeys(DRAWN_LIKE, _drawn),
    **dict.fromkeys(BY_SIZE, _made_like),
    "group_norm": norms.group_norm,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), _convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), _convolution),
}
