"""Ops that put tensors together, or write into places of one (by an index: passes/indexing.py).

cat, stack          labels side by side along the dim, united on the others
pad                 constant places beside labelled ones
slice_scatter       some places of a dim get the labels of what is written
grouped convolution place j of every group goes together; depthwise carries the channel
glu                 place j of both halves goes together
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .values import Arrays, Operand, Site, Value, along, compress, varying
from .visit import Visit


def join(visit: Visit) -> list[Arrays]:
    """cat and stack: labels side by side along the dim, united on the others."""
    rank = len(visit.shape)
    parts = [value for value in visit.values() if value.fake.numel()] or list(visit.values())
    dim = visit.dim("dim", rank)
    stacked = visit.name == "stack"
    arrays = [_unsqueezed(value, dim) if stacked else dict(value.arrays) for value in parts]
    sizes = [1 if stacked else value.shape[dim] for value in parts]
    result: Arrays = {}
    for axis, size in enumerate(visit.shape):
        if size == 1:
            continue
        held = [found[axis] for found in arrays if axis in found]
        if axis == dim:
            result[axis] = _join_along(visit, arrays, sizes, dim)
        elif any(array.shape[dim] > 1 for array in held) and len(held) == len(parts):
            result[axis] = _beside(held, sizes, dim)
        else:
            held = [visit.labels.collapse(array, dim) for array in held if array.numel()]
            result[axis] = visit.labels.meet(held)
    return [result]


def _unsqueezed(value: Value, dim: int) -> Arrays:
    return {k + (k >= dim): a.unsqueeze(dim) for k, a in value.arrays.items()}


def _beside(held: list[Tensor], sizes: list[int], dim: int) -> Tensor:
    """Arrays of another home that vary along the joined dim, one after the other."""
    outer = [max(a.shape[k] for a in held) for k in range(held[0].dim())]
    pieces = []
    for array, size in zip(held, sizes, strict=True):
        shape = [size if k == dim else n for k, n in enumerate(outer)]
        pieces.append(array.expand(shape))
    return compress(torch.cat(pieces, dim))


def _join_along(visit: Visit, arrays: list[Arrays], sizes: list[int], dim: int) -> Tensor:
    fixed = visit.fixed(f"a place in {visit.name}")
    held = [found.get(dim, fixed) for found in arrays]
    if all(visit.labels.is_fixed(array) for array in held):
        return held[0]
    return _beside(held, sizes, dim)


def pad(visit: Visit) -> list[Arrays]:
    """Zero padding adds constant places to a labelled dim; any other kind fixes the dim."""
    value = next(visit.values())
    pads, rank, result = list(visit.given["pad"]), len(value.shape), dict(value.arrays)
    zero = (visit.given.get("mode") or "constant") == "constant" and not visit.given.get("value")
    for k in range(len(pads) // 2):
        dim, (left, right) = rank - 1 - k, pads[2 * k : 2 * k + 2]
        if not left and not right:
            continue
        inner = result.get(dim)
        if inner is None or visit.labels.is_fixed(inner):
            result[dim] = visit.fixed("a padded place")
            continue
        if left < 0 or right < 0 or not zero or inner.numel() != inner.shape[dim]:
            visit.freeze([inner], f"padded by {visit.name}")
            result[dim] = visit.fixed(f"padded by {visit.name}")
            continue
        ends = [
            along(visit.labels.fresh("constant", visit.node.name, dim, n), dim, rank)
            for n in (left, right)
        ]
        result[dim] = torch.cat([ends[0], inner, ends[1]], dim)
    for dim, array in result.items():
        for other in varying(array):
            if array.shape[other] != visit.shape[other]:
                array = visit.labels.collapse(array, other)
        result[dim] = array
    return [{d: a for d, a in result.items() if visit.shape[d] > 1}]


def grouped_convolution(visit: Visit) -> list[Arrays]:
    """Depthwise: the channel is carried. Else place j of every group goes together. Of its two
    channel dims the weight [o, i / groups] has the second in common for all groups; a transposed
    one [i, o / groups] too.
    """
    labels, groups = visit.labels, visit.given["groups"]
    transposed = visit.name.startswith("conv_transpose") or visit.given.get("transposed", False)
    x, w = visit.given["input"], visit.given["weight"]
    rank, channel = len(x.shape), len(x.shape) - (len(w.shape) - 1)
    arrays = {d: a for d, a in x.arrays.items() if d < channel}
    visit.freeze([a for d, a in x.arrays.items() if d > channel], "a position")
    visit.freeze([a for d, a in w.arrays.items() if d > 1], "a kernel position")
    for d in range(channel + 1, rank):
        if visit.shape[d] > 1:
            arrays[d] = visit.fixed(f"a position of {visit.name}")
    inner, own = x.arrays.get(channel), w.arrays.get(0)
    if inner is None or own is None:
        visit.freeze([a for a in (inner, *w.arrays.values()) if a is not None], "grouped")
        return [{**arrays, channel: visit.fixed("grouped")}]
    inner = labels.alone(inner, channel)
    lanes = inner.expand([x.shape[d] if d == channel else 1 for d in range(rank)])
    lanes = lanes.reshape(groups, -1)
    own = own.expand([w.shape[0]] + [1] * (own.dim() - 1)).reshape(groups, -1)
    if lanes.shape[1] == 1:
        if transposed:
            visit.freeze([a for d, a in w.arrays.items() if d == 1], "grouped")
        labels.unite(lanes, own)
        out = lanes.expand(-1, w.shape[1]) if transposed else own
        labels.mark("bent", [out], "depthwise convolution")
    else:
        row = visit.fixed("grouped")
        if 1 in w.arrays:
            row = w.arrays[1].expand([w.shape[1] if d == 1 else 1 for d in range(len(w.shape))])
        row = row.reshape(1, -1).expand(-1, w.shape[1])
        summed, out = (own, row.expand(groups, -1)) if transposed else (row, own)
        labels.unite(lanes, summed)
        labels.unite(own[:1], own)
        nodes = (visit.bound["input"], visit.bound["weight"])
        sides = (
            Operand(nodes[0], channel, lanes, True),
            Operand(nodes[1], int(not transposed), summed, False),
        )
        labels.sites.append(Site(visit.node, sides))
    arrays[channel] = along(out.reshape(-1), channel, rank)
    bias = visit.given.get("bias")
    if bias is not None:
        labels.unite(bias.arrays[0], out.reshape(-1))
    return [arrays]


def scatter_part(visit: Visit) -> list[Arrays]:
    """slice_scatter, select_scatter: a part of self is replaced by src."""
    labels, value, source = visit.labels, visit.given["self"], visit.given["src"]
    rank = len(value.shape)
    dim = visit.dim("dim", rank)
    arrays = dict(source.arrays)
    if visit.name == "select_scatter":
        arrays = {d + (d >= dim): a.unsqueeze(dim) for d, a in arrays.items()}
        places = [visit.given["index"] % value.shape[dim]]
    else:
        bounds = (visit.given["start"], visit.given["end"], visit.given["step"])
        places = list(range(value.shape[dim]))[slice(*bounds)]
        if visit.given["step"] != 1:
            held = [found[dim] for found in (value.arrays, arrays) if dim in found]
            visit.freeze(held, "written by strides")
    result: Arrays = {}
    for axis, array in value.arrays.items():
        other = arrays.get(axis)
        if axis != dim:
            held = [labels.collapse(array, dim)]
            held += [labels.collapse(other, dim)] if other is not None else []
            result[axis] = labels.meet(held)
        elif labels.is_fixed(array) and (other is None or labels.is_fixed(other)):
            result[axis] = array
        else:
            other = visit.fixed(f"a place in {visit.name}") if other is None else other
            result[axis] = _written(array, other, dim, places, value.shape[dim])
    return [result]


def _written(array: Tensor, other: Tensor, dim: int, places: list[int], size: int) -> Tensor:
    """`array` with the labels `other` at `places` along `dim`."""
    shape = [max(a, b) for a, b in zip(array.shape, other.shape, strict=True)]
    whole = array.expand([size if k == dim else n for k, n in enumerate(shape)]).clone()
    part = other.expand([len(places) if k == dim else n for k, n in enumerate(shape)])
    return whole.index_copy(dim, torch.tensor(places, dtype=torch.long), part)


def glu(visit: Visit) -> list[Arrays]:
    """First half times sigmoid of the second: place j of both goes together."""
    value = next(visit.values())
    rank, labels = len(value.shape), visit.labels
    dim = visit.dim("dim", rank, -1)
    half = value.shape[dim] // 2
    result: Arrays = {}
    for axis, array in value.arrays.items():
        if array.shape[dim] > 1:
            labels.unite(array.narrow(dim, 0, half), array.narrow(dim, half, half))
            array = array.narrow(dim, 0, half)
        result[axis] = array
    if dim in result:
        labels.mark("bent", [result[dim]], visit.name)
    return [{d: a for d, a in result.items() if visit.shape[d] > 1}]


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {
    **dict.fromkeys(("cat", "stack"), join),
    **dict.fromkeys(("constant_pad_nd", "pad"), pad),
    "glu": glu,
    **dict.fromkeys(("slice_scatter", "select_scatter"), scatter_part),
}
