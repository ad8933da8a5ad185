"""Writes into parts of a tensor that cover all of it: a concatenation, or a stack.

h = empty; h[:, :4] = a; h[:, 4:] = b         cat([a, b], 1)
h = empty; h[:, 0::2] = a; h[:, 1::2] = b     stack([a, b], 2), flattened
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .visit import bind

aten = torch.ops.aten


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """The recorded shape of a node's result; None where it is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def join(node: Node) -> None:
    """Writes that cover a dim from end to end are a concatenation of what was written; those at
    every k-th place, one for each remainder, are a stack, flattened.
    """
    shape = shape_of(node)
    dim = bind(node, node.args, node.kwargs)["dim"] or 0
    written = _written(node, dim, shape)
    if written is None or shape is None:
        return
    step, pieces = written
    parts = _end_to_end(pieces, shape[dim]) if step == 1 else _remainders(pieces, step, shape[dim])
    if parts is None or not all(_same_but(p, shape, dim) for p in parts):
        return
    graph = node.graph
    with graph.inserting_before(node):
        if step == 1:
            joined = graph.call_function(aten.cat.default, (parts, dim))
        else:
            after = dim % len(shape) + 1
            beside = graph.call_function(aten.stack.default, (parts, after))
            joined = graph.call_function(aten.flatten.using_ints, (beside, after - 1, after))
    joined.meta = dict(node.meta)
    node.replace_all_uses_with(joined)
    node.graph.erase_node(node)


Pieces = dict[int, tuple[int, Node]]
"""Where a write starts -> where it ends, and what is written."""


def _written(node: Node, dim: int, shape: tuple[Any, ...] | None) -> tuple[int, Pieces] | None:
    """The common step of a chain of writes along `dim`, and the last write to each place."""
    pieces: Pieces = {}
    step = bind(node, node.args, node.kwargs)["step"]
    at: Any = node
    while isinstance(at, Node) and at.target is aten.slice_scatter.default:
        bound = bind(at, at.args, at.kwargs)
        bounds = (bound["start"], bound["end"])
        if (bound["dim"] or 0) != dim or bound["step"] != step or shape is None:
            return None
        if not isinstance(shape[dim], int) or any(isinstance(b, Node) for b in bounds):
            return None
        low, high, _ = slice(*bounds).indices(shape[dim])
        pieces.setdefault(low, (high, bound["src"]))
        at = bound["self"]
    return step, pieces


def _end_to_end(pieces: Pieces, size: int) -> list[Node] | None:
    low, parts = 0, []
    while low in pieces and low < size:
        low, part = pieces[low]
        parts.append(part)
    return parts if low == size else None


def _remainders(pieces: Pieces, step: int, size: int) -> list[Node] | None:
    whole = set(pieces) == set(range(step)) and all(high == size for high, _ in pieces.values())
    return [pieces[low][1] for low in range(step)] if whole and size % step == 0 else None


def _same_but(part: Node, shape: tuple[Any, ...], dim: int) -> bool:
    """Whether a written part needed no broadcast."""
    held = shape_of(part)
    if held is None or len(held) != len(shape):
        return False
    at = dim % len(shape)
    return all(
        str(a) == str(b) for k, (a, b) in enumerate(zip(held, shape, strict=True)) if k != at
    )
