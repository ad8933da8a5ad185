"""norms: edits of ops whose result depends on how many positions an axis has."""

from __future__ import annotations

import torch

from .edit import Edit
from .errors import UnsupportedOp
from .removal import count

aten = torch.ops.aten


def mean(edit: Edit) -> None:
    """Divided by as many positions as there were."""
    rank, dims = len(edit.shape(edit.source)), edit.bound.get("dim")
    dims = range(rank) if not dims else [dims] if isinstance(dims, int) else dims
    _rescale(edit, float(edit.cut.share(edit.source.name, {dim % rank for dim in dims})))


def rms_norm(edit: Edit) -> None:
    """With n counted and k present: x / sqrt(S / n + e) = sqrt(n / k) x / sqrt(S / k + e n / k)."""
    rank = len(edit.shape(edit.source))
    dims = range(rank - len(edit.bound["normalized_shape"]), rank)
    share = float(edit.cut.share(edit.source.name, dims))
    normalized(edit)
    if share != 1:
        edit.change(eps=edit.bound["eps"] / share)
        _rescale(edit, share**-0.5)


def _rescale(edit: Edit, factor: float) -> None:
    """The node's result times a number; a new node before it does what it did."""
    if factor == 1:
        return
    node = edit.node
    with node.graph.inserting_before(node):
        made = node.graph.call_function(node.target, node.args, node.kwargs)
    made.meta = dict(node.meta)
    edit.become(aten.mul.Tensor, made, factor)


def normalized(edit: Edit) -> None:
    """The sizes of the axes that are normalised."""
    rank, sizes = len(edit.shape(edit.source)), list(edit.bound["normalized_shape"])
    for dim, mask in edit.ins[edit.source].items():
        at = dim - rank + len(sizes)
        if at >= 0:
            sizes[at] = count(mask, dim)
    edit.change(normalized_shape=sizes)


def group_norm(edit: Edit) -> None:
    """The groups that keep channels; each must keep as many."""
    mask, groups = edit.ins[edit.source].get(1), edit.bound["num_groups"]
    if mask is None:
        return
    if mask.numel() != mask.shape[1]:
        raise UnsupportedOp("the channels of a group norm would be cut in blocks of another axis")
    kept = mask.reshape(groups, -1).sum(1)
    sizes = torch.unique(kept[kept > 0]).tolist()
    if len(sizes) > 1:
        raise UnsupportedOp(f"the groups of a norm would keep unequal numbers of channels: {sizes}")
    edit.change(num_groups=int((kept > 0).sum()))
