"""normalize: the same program in a form that labels can see through better.

    select, unbind, split of a reshape's outer dim   slices of the flat dim, reshaped one by one
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
            if chain is not None:
                _replace(node, chain, ranges)
            elif op_name(node) in ("select", "unbind"):
                _stride(node, dim, ranges)
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
            break
        if before is None:
            return None
        chain.append((at, dim))
        dim = before
        at = at.args[0]
    if not isinstance(at, Node) or at.op != "call_function" or op_name(at) not in RESHAPES:
        return None
    shape, source = shape_of(at), shape_of(at.args[0])
    if shape is None or source is None or not all(isinstance(n, int) for n in shape[dim:]):
        return None
    whole = math.prod(shape[dim:]) == source[-1]  # other dims may be merged on the way
    splits = dim < len(shape) - 1 and (len(shape) > len(source) or whole)
    if not splits or math.prod(shape[dim:]) == 0 or _ends(source, math.prod(shape[dim + 1 :])):
        return None
    return chain, at, dim


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


def _replace(node: Node, chain: Chain, ranges: list[tuple[int, int]]) -> None:
    moves, reshape, dim = chain
    shape, source = shape_of(reshape), shape_of(reshape.args[0])
    assert shape is not None and source is not None
    rest = shape[dim + 1 :]
    inner, graph = math.prod(rest), node.graph
    made: list[Node] = []
    with graph.inserting_before(node):
        flat = reshape.args[0]
        if [str(n) for n in source[:-1]] != [str(n) for n in shape[:dim]]:
            sizes = list(bind(reshape, reshape.args, reshape.kwargs).get("shape") or shape)
            if not all(isinstance(n, (int, Node)) for n in sizes[:dim]):
                return
            target = [*sizes[:dim], shape[dim] * inner]
            flat = graph.call_function(aten.reshape.default, (flat, target))
            made.append(flat)
        pieces = []
        for low, high in ranges:
            part = graph.call_function(aten.slice.Tensor, (flat, dim, low * inner, high * inner))
            made += [
                part,
                graph.call_function(aten.unflatten.int, (part, dim, [high - low, *rest])),
            ]
            for moved, place in reversed(moves):
                arguments = (made[-1], *moved.args[1:])
                if op_name(moved) in RESHAPES:
                    sizes = list(moved.args[1])  # type: ignore[arg-type]
                    arguments = (made[-1], [*sizes[:place], high - low, *sizes[place + 1 :]])
                made.append(graph.call_function(moved.target, arguments, moved.kwargs))
            if op_name(node) in ("select", "unbind"):
                at = bind(node, node.args, node.kwargs)["dim"] or 0
                made.append(graph.call_function(aten.select.int, (made[-1], at, 0)))
            pieces.append(made[-1])
    for new in made:
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    _redirect(node, pieces)


def _stride(node: Node, dim: int, ranges: list[tuple[int, int]]) -> None:
    """The innermost of the dims that a reshape splits the last dim into, taken by stride."""
    reshape: Any = node.args[0]
    if reshape.op != "call_function" or op_name(reshape) not in RESHAPES:
        return
    shape, source = shape_of(reshape), shape_of(reshape.args[0])
    if shape is None or source is None or dim != len(shape) - 1 or len(shape) <= len(source):
        return
    last = len(source) - 1
    split = shape[last:]
    if not all(isinstance(n, int) for n in (*split, source[last])):
        return
    if math.prod(split) != source[last]:
        return
    made: list[Node] = []
    pieces = []
    with node.graph.inserting_before(node):
        for low, _ in ranges:
            arguments = (reshape.args[0], last, low, source[last], shape[dim])
            made.append(node.graph.call_function(aten.slice.Tensor, arguments))
            if len(split) > 2:
                sizes = list(split[:-1])
                made.append(node.graph.call_function(aten.unflatten.int, (made[-1], last, sizes)))
            pieces.append(made[-1])
    for new in made:
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
    _redirect(node, pieces)


def _redirect(node: Node, pieces: list[Node]) -> None:
    if op_name(node) in ("select", "slice", "index"):
        node.replace_all_uses_with(pieces[0])
        node.graph.erase_node(node)
        return
    for user in list(node.users):
        user.replace_all_uses_with(pieces[user.args[1]])  # type: ignore[call-overload]
        node.graph.erase_node(user)
    node.graph.erase_node(node)
