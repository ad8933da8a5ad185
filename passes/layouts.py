"""layouts: blocks first, what is inside them last, in whichever order a split has them.

    [n, (d h)] -> [n, d, h], where h is a batch axis of attention     as
    [n, (d h)] -> take (h d) -> [n, h, d] -> transpose
    [n, d, h] -> [n, (d h)]                                       as
    [n, d, h] -> transpose -> [n, (h d)] -> take (d h)

Labels take the innermost dim of a split for what is inside blocks (passes/moves.py). A batch axis
of a contraction enumerates blocks. Where it is the inner dim, the positions of the flat dim are
taken in the other order first, so that each block may keep places of its own. The numbers are the
same to the last bit. Which splits and merges these are is read off the labels.
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
from .normalize import PASSED, SPLITTING, redirect, taken
from .pointwise import is_pointwise
from .reshapes import RESHAPES, Run, before, call, merged, splits
from .visit import op_name

aten = torch.ops.aten
ALIKE = PASSED | RESHAPES | {"slice", "select"}
ORDERING = {"permute", "transpose", "einsum"}


def blocks_first(module: GraphModule, inputs: Args) -> GraphModule:
    """Turn the splits whose inner dim enumerates blocks (in place)."""
    nodes = [node for node in module.graph.nodes if op_name(node) in ORDERING]
    turned = dict.fromkeys(found for node in nodes for found in _reordered(node))
    merges = [(node, run) for node in module.graph.nodes for run in _merges(node)]
    if not turned and not merges:
        return module
    labels = propagate(module, inputs)
    component = united(labels.count, labels.edges)
    inside = [component[array.numpy()].reshape(-1) for array in labels.inside]
    batch = np.isin(component, np.concatenate([*inside, []]))
    for node, run in turned:
        held = labels.values[node].arrays.get(run.end - 1)
        if held is not None and batch[held.numpy()].any():
            _turn(module, node, run)
    for node, run in merges:
        arrays = labels.values[node.args[0]].arrays
        outer, held = arrays.get(run.end - 2), arrays.get(run.end - 1)
        varies = outer is not None and outer.shape[run.end - 1] > 1
        if varies or (held is not None and batch[held.numpy()].any()):
            _turn_back(module, node, run)
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
            for run in splits(split) if op_name(split) in RESHAPES else []:
                held = [place for place in found if place in run]
                if held != sorted(held):
                    yield split, run


def _merges(node: Node) -> Iterator[Run]:
    """Dims that a node merges, the last two of which stood in another order where an op made them
    (in an einsum they may). Those that a reshape made are shuffled.
    """
    for run in splits(node, merges=True) if op_name(node) in RESHAPES | {"flatten"} else []:
        (one, place), (other, last) = (_origin(node.args[0], run.end - k) for k in (2, 1))
        made = one is other and op_name(one) not in RESHAPES
        if made and (place > last or op_name(one) == "einsum"):
            yield run


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
        if dim == run.end - 1:  # never one place by itself: normalize takes those of the flat dim
            redirect(user, [_turned(module, user, node, run, places[..., a:b]) for a, b in ranges])
        else:
            user.replace_input_with(node, _turned(module, user, node, run, places))


def _turned(module: GraphModule, user: Node, node: Node, run: Run, places: Tensor) -> Node:
    """Places of the flat dim as [..., a, b], by way of [..., b, a]."""
    size, order = math.prod((shape_of(node) or ())[run.first : run.end]), places.mT
    index = _index(module, user, node, order)
    with module.graph.inserting_before(user):
        flat = merged(node, node, range(run.first, run.end), size)
        part = call(node, aten.index_select.default, flat, run.first, index)
        part = call(node, aten.unflatten.int, part, run.first, list(order.shape))
        return call(node, aten.transpose.int, part, run.end - 1, run.end - 2)


def _turn_back(module: GraphModule, node: Node, run: Run) -> None:
    """[..., a, b] as one dim, by way of [..., b, a]."""
    *outer, a, b = (shape_of(node.args[0]) or ())[run.first : run.end]
    places = torch.arange(math.prod((*outer, a, b))).view(*outer, b, a)
    index = _index(module, node, node, places.mT)
    with module.graph.inserting_before(node):
        part = call(node, aten.transpose.int, node.args[0], run.end - 1, run.end - 2)
        part = call(node, node.target, part, *node.args[1:], **node.kwargs)
        part = call(node, aten.index_select.default, part, run.first, index)
    node.replace_all_uses_with(part)


def _index(module: GraphModule, user: Node, node: Node, order: Tensor) -> Node:
    flat = order.reshape(-1)
    index = hold(module, user, f"_order_{node.name}_{user.name}_{int(flat.min())}", flat)
    index.meta["val"] = node.meta["val"].fake_mode.from_tensor(flat)
    return index
