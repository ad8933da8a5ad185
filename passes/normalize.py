"""normalize: the same program in a form that labels can see through better.

    select, unbind, split of an outer dim that a      slices of the flat dim, reshaped one by one
    reshape splits another one into
    ... of the innermost of them                      slices by stride
    ... with permutes and reshapes in between         the slice goes first
    constants that several places read                an alias for each (passes/constants.py)
    slice_scatters that cover a tensor                cat, or stack where they go by strides

A fused QKV is often reshaped to (3, heads, size) and then taken apart: in that form Q, K and V
share the dim `size` and would have to shrink together. Taken apart first, each shrinks alone. The
numbers are the same to the last bit: only the order of data movement changes.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .constants import separate
from .joins import join, shape_of
from .reshapes import RESHAPES, before, call, merged, splits
from .visit import bind, op_name

aten = torch.ops.aten
SPLITTING = {"split", "split_with_sizes", "chunk"}
PASSED = {"permute", "transpose", "unsqueeze", "squeeze", "flatten", "clone", "contiguous"}


def normalize(module: GraphModule) -> GraphModule:
    """Take fused dims apart before they are reshaped (in place)."""
    for node in list(module.graph.nodes):
        if node.target is aten.slice_scatter.default:
            join(node)
    for node in list(module.graph.nodes):
        parts = taken(module, node)
        if parts is not None:
            dim, ranges = parts
            chain = _chain(module, node, dim)
            cut = None if chain is None else _cut(*chain[1:], ranges)
            if chain is not None and cut is not None:
                _replace(module, node, chain, cut)
    separate(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def taken(module: GraphModule, node: Node) -> tuple[int, list[tuple[int, int]]] | None:
    """The dim that a node takes apart, and the ranges of positions that it takes."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    shape, name = shape_of(node.args[0]), op_name(node)
    if shape is None or name not in {"select", "unbind", "slice", "index"} | SPLITTING:
        return None
    bound = bind(node, node.args, node.kwargs)
    if name == "index":
        return _constant_range(module, bound["indices"], shape)
    dim = (bound["dim"] or 0) % len(shape)
    size = shape[dim]
    if not isinstance(size, int):
        return None
    if name == "select":
        at = bound["index"] % size if isinstance(bound["index"], int) else None
        return None if at is None else (dim, [(at, at + 1)])
    if name == "unbind":
        return dim, [(at, at + 1) for at in range(size)]
    if name == "slice":
        bounds = (bound["start"], bound["end"])
        if bound["step"] != 1 or not all(b is None or isinstance(b, int) for b in bounds):
            return None
        low, high, _ = slice(*bounds).indices(size)
        return (dim, [(low, high)]) if low < high else None
    return dim, _pieces(node, dim)


def _pieces(node: Node, dim: int) -> list[tuple[int, int]]:
    found, low = [], 0
    for part in node.meta["val"]:
        found.append((low, low + part.shape[dim]))
        low += part.shape[dim]
    return found


def _constant_range(
    module: GraphModule, indices: Any, shape: tuple[Any, ...]
) -> tuple[int, list[tuple[int, int]]] | None:
    """Indexing one dim by a constant run of positions is a slice."""
    at = [d for d, index in enumerate(indices) if index is not None]
    if len(at) != 1:
        return None
    node = indices[at[0]]
    while isinstance(node, Node) and op_name(node) in ("lift_fresh_copy", "clone", "detach"):
        node = node.args[0]  # type: ignore[assignment]
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    table: Any = operator.attrgetter(str(node.target))(module)
    if not isinstance(table, Tensor) or table.dim() != 1 or table.dtype == torch.bool:
        return None
    if type(table) is not Tensor or not isinstance(shape[at[0]], int):
        return None
    places = [int(p) % shape[at[0]] for p in table]
    if places != list(range(places[0], places[0] + len(places))):
        return None
    return at[0], [(places[0], places[0] + len(places))]


Chain = tuple[list[tuple[Node, int]], Node, int, int]


def _chain(module: GraphModule, node: Node, dim: int) -> Chain | None:
    """The movement nodes (with the dim in their result) between a node and the reshape that makes
    `dim`, the reshape, the dim there, and its position that the node counts from.
    """
    chain: list[tuple[Node, int]] = []
    at, start = _beneath(module, node.args[0], dim)
    while isinstance(at, Node) and at.op == "call_function" and op_name(at) in PASSED | RESHAPES:
        place = before(at, dim)
        if place is None and op_name(at) in RESHAPES:
            return chain, at, dim, start
        if place is None:
            return None
        chain.append((at, dim))
        dim = place
        at, low = _beneath(module, at.args[0], dim)
        start += low
    return None


@dataclass(frozen=True)
class _Part:
    """Positions low, low + step, ... below high of a flat dim, the sizes that they split to, and
    how many are taken along the dim of the reshape (by stride, one).
    """

    low: int
    high: int
    step: int
    taken: int
    sizes: list[int]


@dataclass(frozen=True)
class _Cut:
    """Parts of a dim of `size`: `dims` of a reshape, merged again."""

    dims: range
    size: int
    parts: list[_Part]


def _cut(reshape: Node, dim: int, start: int, ranges: list[tuple[int, int]]) -> _Cut | None:
    """The parts of a flat dim that are ranges of positions (from `start`) along `dim` of its
    reshape: runs where the dim is an outer one, by stride (single positions) where it is the
    innermost.
    """
    ranges = [(start + low, start + high) for low, high in ranges]
    shape, run = shape_of(reshape), next((run for run in splits(reshape) if dim in run), None)
    if shape is None or run is None:
        return None
    if dim < run.end - 1:
        rest = shape[dim + 1 : run.end]
        inner = math.prod(rest)
        parts = [_Part(a * inner, b * inner, 1, b - a, [b - a, *rest]) for a, b in ranges]
        return _Cut(range(dim, run.end), shape[dim] * inner, parts)
    if any(high - low != 1 for low, high in ranges):
        return None
    *outer, step = shape[run.first : run.end]
    size = math.prod(outer) * step
    parts = [_Part(a, size, step, 1, outer) for a, _ in ranges]
    return _Cut(range(run.first, run.end), size, parts)


def _replace(module: GraphModule, node: Node, chain: Chain, cut: _Cut) -> None:
    moves, reshape, *_ = chain
    with node.graph.inserting_before(node):
        flat, dim, pieces = merged(node, reshape, cut.dims, cut.size), cut.dims.start, []
        flat, start = _beneath(module, flat, dim)
        for part in cut.parts:
            bounds = (start + part.low, start + part.high, part.step)
            piece = call(node, aten.slice.Tensor, flat, dim, *bounds)
            piece = call(node, aten.unflatten.int, piece, dim, part.sizes)
            if part.step > 1:
                piece = call(node, aten.unsqueeze.default, piece, cut.dims.stop - 1)
            for moved, place in reversed(moves):
                arguments = moved.args[1:]
                if op_name(moved) == "reshape":
                    sizes = list(moved.args[1])  # type: ignore[arg-type]
                    arguments = ([*sizes[:place], part.taken, *sizes[place + 1 :]],)
                piece = call(node, moved.target, piece, *arguments, **moved.kwargs)
            if op_name(node) in ("select", "unbind"):
                at = bind(node, node.args, node.kwargs)["dim"] or 0
                piece = call(node, aten.select.int, piece, at, 0)
            pieces.append(piece)
    redirect(node, pieces)


def _beneath(module: GraphModule, node: Any, dim: int) -> tuple[Any, int]:
    """What a slice along `dim` is one of, and where it starts there."""
    start = 0
    while (
        isinstance(node, Node)
        and op_name(node) == "slice"
        and (found := taken(module, node))
        and found[0] == dim
    ):
        start += found[1][0][0]
        node = node.args[0]
    return node, start


def redirect(node: Node, pieces: list[Node]) -> None:
    """Give the users of a node that takes parts the pieces in its place."""
    if op_name(node) in ("select", "slice", "index"):
        node.replace_all_uses_with(pieces[0])
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        user.replace_all_uses_with(pieces[user.args[1]])  # type: ignore[call-overload]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
