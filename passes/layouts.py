"""layouts: blocks first, what is inside them last, in whichever order a split has them.

    [n, (d h)] -> [n, d, h], where h is a batch axis of attention     as
    [n, (d h)] -> take (h d) -> [n, h, d] -> transpose

Labels take the innermost dim of a split for what is inside blocks (passes/moves.py). A batch axis
of a contraction enumerates blocks. Where it is the inner dim, the positions of the flat dim are
taken in the other order first, so that each block may keep places of its own. The numbers are the
same to the last bit. Which splits these are is read off the labels.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .edit import hold
from .footprints import united
from .free_axes import Args
from .joins import shape_of
from .labels import propagate
from .normalize import (
    PASSED,
    RESHAPES,
    SPLITTING,
    Run,
    before,
    call,
    merged,
    redirect,
    split_of,
    taken,
)
from .pointwise import is_pointwise
from .values import Labels
from .visit import op_name

aten = torch.ops.aten
ALIKE = PASSED | RESHAPES | {"slice", "select"}
ORDERING = {"permute", "transpose", "einsum"}


def blocks_first(module: GraphModule, inputs: Args) -> GraphModule:
    """Turn the splits whose inner dim enumerates blocks (in place)."""
    nodes = [node for node in module.graph.nodes if op_name(node) in ORDERING]
    splits = {split: run for node in nodes for split, run in _reordered(node)}
    labels = propagate(module, inputs) if splits else Labels()
    if not labels.inside:
        return module
    component = united(labels.count, labels.edges)
    batch = np.concatenate([component[array.numpy()].reshape(-1) for array in labels.inside])
    for node, run in splits.items():
        held = labels.values[node].arrays.get(run.end - 1)
        if held is not None and np.isin(component[held.numpy()], batch).any():
            _turn(module, node, run)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _reordered(node: Node) -> Iterator[tuple[Node, Run]]:
    """The splits whose dims a node puts in another order, as an einsum may."""
    for source in node.all_input_nodes:
        dims = range(len(shape_of(source) or ()))
        order = dims[::-1] if op_name(node) == "einsum" else [before(node, dim) for dim in dims]
        places: dict[Node, list[int]] = {}
        for dim in order:
            split, place = _origin(source, dim) if dim is not None else (node, 0)
            places.setdefault(split, []).append(place)
        for split, found in places.items():
            run = split_of(split) if op_name(split) in RESHAPES else None
            held = [place for place in found if run and run.first <= place < run.end]
            if run and held != sorted(held):
                yield split, run


def _origin(node: Node, dim: int) -> tuple[Node, int]:
    """The node that makes a dim, and the dim there."""
    while True:
        if node.target is operator.getitem and op_name(node.args[0]) in SPLITTING:
            node = node.args[0].args[0]
        alike = op_name(node) in ALIKE or is_pointwise(node)
        place = before(node, dim) if alike and node.all_input_nodes else None
        if place is None:
            return node, dim
        node, dim = node.args[0], place


def _turn(module: GraphModule, node: Node, run: Run) -> None:
    """What is taken of the inner dim is taken by itself; all of it for other users."""
    split = (shape_of(node) or ())[run.first : run.end]
    places = torch.arange(math.prod(split)).view(split)
    for user in list(node.users):
        dim, ranges = taken(module, user) or (None, [])
        if dim == run.end - 1 and op_name(user) not in ("select", "unbind"):
            redirect(user, [_turned(module, user, node, run, places[..., a:b]) for a, b in ranges])
        else:
            user.replace_input_with(node, _turned(module, user, node, run, places))


def _turned(module: GraphModule, user: Node, node: Node, run: Run, places: Tensor) -> Node:
    """Places of the flat dim as [..., a, b], by way of [..., b, a]."""
    size, order = math.prod((shape_of(node) or ())[run.first : run.end]), places.mT
    name = f"_order_{node.name}_{user.name}_{int(places.min())}"
    index = hold(module, user, name, order.reshape(-1))
    index.meta["val"] = node.meta["val"].fake_mode.from_tensor(order.reshape(-1))
    with module.graph.inserting_before(user):
        flat = merged(node, node, range(run.first, run.end), size)
        part = call(node, aten.index_select.default, flat, run.first, index)
        part = call(node, aten.unflatten.int, part, run.first, list(order.shape))
        return call(node, aten.transpose.int, part, run.end - 1, run.end - 2)
