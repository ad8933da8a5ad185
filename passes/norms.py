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
    """As many groups as before, of fewer channels; a group for every channel that stays."""
    mask, groups = edit.ins[edit.source].get(1), edit.bound["num_groups"]
    if mask is not None and groups == edit.shape(edit.source)[1]:
        edit.change(num_groups=count(mask, 1))
    elif mask is not None and count(mask, 1) % groups:
        raise UnsupportedOp(f"{count(mask, 1)} channels would stay, no multiple of {groups} groups")
