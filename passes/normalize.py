"""normalize: the same program in a form that labels can see through better.

    select, unbind, split of a reshape's outer dim   slices of the flat dim, reshaped one by one
    ... of its innermost dim                         slices by stride
    ... with permutes and reshapes in between        the slice goes first
    constants that several places read               an alias for each (passes/constants.py)
    slice_scatters that cover a tensor               cat, or stack where they go by strides

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
from .visit import bind, op_name

aten = torch.ops.aten
RESHAPES = {"reshape", "view", "_unsafe_view", "unflatten"}
PASSED = {"permute", "transpose", "unsqueeze", "squeeze", "clone", "contiguous"}


def normalize(module: GraphModule) -> GraphModule:
    """Take fused dims apart before they are reshaped (in place)."""
    for node in list(module.graph.nodes):
        if node.target is aten.slice_scatter.default:
            join(node)
    for node in list(module.graph.nodes):
        parts = _parts(module, node)
        if parts is not None:
            dim, ranges = parts
            chain = _chain(node, dim)
            cut = None if chain is None else _cut(chain[1], chain[2], ranges)
            if chain is not None and cut is not None:
                _replace(node, chain, cut)
    separate(module)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _parts(module: GraphModule, node: Node) -> tuple[int, list[tuple[int, int]]] | None:
    """The dim that a node takes apart, and the ranges of positions that it takes."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return None
    shape, name = shape_of(node.args[0]), op_name(node)
    if shape is None or name not in (
        "select",
        "unbind",
        "slice",
        "split",
        "chunk",
        "index",
        "split_with_sizes",
    ):
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


Chain = tuple[list[tuple[Node, int]], Node, int]


def _chain(node: Node, dim: int) -> Chain | None:
    """The movement nodes (with the dim in their result) between a node and the reshape that makes
    `dim`, the reshape, and the dim there.
    """
    chain: list[tuple[Node, int]] = []
    at = node.args[0]
    while isinstance(at, Node) and at.op == "call_function" and op_name(at) in PASSED | RESHAPES:
        before = _before(at, dim)
        if before is None and op_name(at) in RESHAPES:
            return chain, at, dim
        if before is None:
            return None
        chain.append((at, dim))
        dim = before
        at = at.args[0]
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
    """The parts of the dim `dim` of size `size` that a reshape splits."""

    dim: int
    size: int
    parts: list[_Part]


def _cut(reshape: Node, dim: int, ranges: list[tuple[int, int]]) -> _Cut | None:
    """The parts of a flat dim that are ranges of positions along `dim` of its reshape: runs where
    the dim is an outer one, by stride where it is the innermost.
    """
    shape, source = shape_of(reshape), shape_of(reshape.args[0])
    if shape is None or source is None or not all(isinstance(n, int) for n in shape[dim:]):
        return None
    if dim == len(shape) - 1:
        return _strided(shape, source, ranges)
    rest = shape[dim + 1 :]
    inner, size = math.prod(rest), math.prod(shape[dim:])
    splits = len(shape) > len(source) or size == source[-1]  # other dims merge on the way
    if not splits or size == 0 or _ends(source, inner):
        return None
    parts = [_Part(a * inner, b * inner, 1, b - a, [b - a, *rest]) for a, b in ranges]
    return _Cut(dim, size, parts)


def _strided(
    shape: tuple[Any, ...], source: tuple[Any, ...], ranges: list[tuple[int, int]]
) -> _Cut | None:
    """Single positions along the innermost of the dims that the last dim of `source` splits to."""
    first = split_from(shape, source)
    if first is None or any(high - low != 1 for low, high in ranges):
        return None
    *outer, step = shape[first:]
    return _Cut(first, source[-1], [_Part(a, source[-1], step, 1, outer) for a, _ in ranges])


def split_from(shape: tuple[Any, ...], source: tuple[Any, ...]) -> int | None:
    """The first of the several dims that the last dim of `source` is split into."""
    for first in range(len(shape) - 2, -1, -1):
        split = shape[first:]
        if not all(isinstance(n, int) for n in (*split, source[-1])):
            return None
        if math.prod(split) == source[-1] and split[0] > 1:
            return first if split[-1] > 1 else None
    return None


def _ends(source: tuple[Any, ...], inner: int) -> bool:
    """Whether what lies inside the dim are whole dims of the source: then `dim` ends one, and its
    parts are apart as they are.
    """
    size = 1
    for number in reversed(source):
        if size >= inner or not isinstance(number, int):
            break
        size *= number
    return size == inner


def _before(node: Node, dim: int) -> int | None:
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
    if name == "squeeze":
        gone = bound.get("dim")
        if not isinstance(gone, int) or source[gone] != 1:
            return None
        return dim + (dim >= gone % len(source))
    if name in RESHAPES:
        sizes = bound.get("shape")
        same = [str(n) for n in shape[: dim + 1]] == [str(n) for n in source[: dim + 1]]
        return dim if same and sizes is not None and len(sizes) == rank else None
    return dim


def _replace(node: Node, chain: Chain, cut: _Cut) -> None:
    moves, reshape, _ = chain
    graph = node.graph
    made: list[Node] = []
    with graph.inserting_before(node):
        flat = _flattened(reshape, cut.dim, cut.size, made)
        if flat is None:
            return
        pieces = []
        for part in cut.parts:
            bounds = (part.low, part.high, part.step)
            made.append(graph.call_function(aten.slice.Tensor, (flat, cut.dim, *bounds)))
            made.append(graph.call_function(aten.unflatten.int, (made[-1], cut.dim, part.sizes)))
            if part.step > 1:
                made.append(graph.call_function(aten.unsqueeze.default, (made[-1], -1)))
            for moved, place in reversed(moves):
                arguments = (made[-1], *moved.args[1:])
                if op_name(moved) in RESHAPES:
                    sizes = list(moved.args[1])  # type: ignore[arg-type]
                    arguments = (made[-1], [*sizes[:place], part.taken, *sizes[place + 1 :]])
                made.append(graph.call_function(moved.target, arguments, moved.kwargs))
            if op_name(node) in ("select", "unbind"):
                at = bind(node, node.args, node.kwargs)["dim"] or 0
                made.append(graph.call_function(aten.select.int, (made[-1], at, 0)))
            pieces.append(made[-1])
    for new in made:
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    _redirect(node, pieces)


def _flattened(reshape: Node, dim: int, size: int, made: list[Node]) -> Node | None:
    """The source of a reshape with its last dims as they are behind it, up to `dim` of `size`."""
    shape, source = shape_of(reshape), shape_of(reshape.args[0])
    assert shape is not None and source is not None
    flat: Any = reshape.args[0]
    if [str(n) for n in source[:-1]] == [str(n) for n in shape[:dim]]:
        return flat  # type: ignore[no-any-return]
    sizes = list(bind(reshape, reshape.args, reshape.kwargs).get("shape") or shape)
    if not all(isinstance(n, (int, Node)) for n in sizes[:dim]):
        return None
    made.append(reshape.graph.call_function(aten.reshape.default, (flat, [*sizes[:dim], size])))
    return made[-1]


def _redirect(node: Node, pieces: list[Node]) -> None:
    if op_name(node) in ("select", "slice", "index"):
        node.replace_all_uses_with(pieces[0])
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        user.replace_all_uses_with(pieces[user.args[1]])  # type: ignore[call-overload]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
