"""reshapes: which dim of its source a dim of a moved result is, and which dims a reshape splits.

    [b, (3 h d), x, y] -> [b, 3, h, d, (x y)]      dims 1 to 4 are of one

Nodes that a pass makes know their shapes, so that passes may follow one another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from .joins import shape_of
from .visit import bind, op_name

aten = torch.ops.aten
RESHAPES = {"reshape", "unflatten"}


@dataclass(frozen=True)
class Run:
    """Dims first..end of a reshape's result that one of its source is split into."""

    first: int
    end: int

    def __contains__(self, dim: int) -> bool:
        return self.first <= dim < self.end


def splits(reshape: Node, merges: bool = False) -> list[Run]:
    """The first and the last dim that a reshape splits (of its source those that it `merges`), if
    all dims before or behind it stay.
    """
    shape, source = shape_of(reshape), shape_of(reshape.args[0])
    if shape is None or source is None:
        return []
    shape, source = (source, shape) if merges else (shape, source)
    first, last, rank = _run(shape, source), _run(shape[::-1], source[::-1]), len(shape)
    found = [first, last and Run(rank - last.end, rank - last.first)]
    return [run for run in dict.fromkeys(found) if run is not None]


def _run(shape: tuple[Any, ...], source: tuple[Any, ...]) -> Run | None:
    first = 0
    while first < min(len(shape), len(source)) and str(shape[first]) == str(source[first]):
        first += 1
    held = source[first] if first < len(source) else None
    for end in range(first + 2, len(shape) + 1):
        split = shape[first:end]
        if not all(isinstance(n, int) and n > 0 for n in (*split, held)):
            return None
        if math.prod(split) == held and min(split[0], split[-1]) > 1:
            return Run(first, end)
    return None


def before(node: Node, dim: int) -> int | None:
    """The dim of a node's source that its result's `dim` is, None if it is a new one."""
    bound, shape, source = (
        bind(node, node.args, node.kwargs),
        shape_of(node),
        shape_of(node.args[0]),
    )
    if shape is None or source is None:
        return None
    name, rank = op_name(node), len(shape)
    if name == "permute":
        return int(bound["dims"][dim]) % rank
    if name == "transpose":
        pair = (bound["dim0"] % rank, bound["dim1"] % rank)
        return pair[1 - pair.index(dim)] if dim in pair else dim
    if name == "unsqueeze":
        new = bound["dim"] % rank
        return None if dim == new else dim - (dim > new)
    if name == "select":
        return dim + (dim >= bound["dim"] % len(source))
    if name == "squeeze":
        gone = bound.get("dim")
        if not isinstance(gone, int) or source[gone] != 1:
            return None
        return dim + (dim >= gone % len(source))
    if name == "flatten" or name in RESHAPES:
        return _stayed(shape, source, dim)
    place = dim - len(shape) + len(source)
    return place if place >= 0 else None


def _stayed(shape: tuple[Any, ...], source: tuple[Any, ...], dim: int) -> int | None:
    """The dim of a source that its reshape's `dim` is: what is before it or behind it is alike."""
    for place, size in enumerate(source):
        if str(size) == str(shape[dim]) and (place == dim or str(size) != "1"):
            sides = (source[:place], shape[:dim]), (source[place + 1 :], shape[dim + 1 :])
            if any(_sizes(one) == _sizes(other) for one, other in sides):
                return place
    return None


def _sizes(dims: tuple[Any, ...]) -> list[str]:
    return [str(size) for size in dims if not (isinstance(size, int) and size == 1)]


def call(like: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node for a part of another, of the shape that it makes."""
    new = like.graph.call_function(target, args, kwargs)
    given = torch.fx.map_arg((args, kwargs), lambda node: node.meta["val"])
    new.meta = {**like.meta, "val": target(*given[0], **given[1])}
    return new


def merged(like: Node, reshape: Node, dims: range, size: int) -> Node:
    """What a reshape makes, but for `dims`, which are one."""
    flat: Any = reshape.args[0]
    bound, source = bind(reshape, reshape.args, reshape.kwargs), shape_of(flat)
    made = list(shape_of(reshape) or ())
    made[dims.start : dims.stop] = [size]
    if [str(n) for n in made] == [str(n) for n in source or ()]:
        return flat  # type: ignore[no-any-return]
    if op_name(reshape) == "reshape":
        sizes = list(bound["shape"])
        sizes[dims.start : dims.stop] = [size]
        return call(like, aten.reshape.default, flat, sizes)
    first, sizes = bound["dim"] % len(source or ()), list(bound["sizes"])
    sizes[dims.start - first : dims.stop - first] = [size]
    return call(like, aten.unflatten.int, flat, first, sizes)
