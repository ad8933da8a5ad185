"""layouts: blocks first, what is inside them last, in whichever order a split has them.

    [n, (d h)] -> [n, d, h], where h is a batch axis of attention     as
    [n, (d h)] -> take (h d) -> [n, h, d] -> transpose

Labels take the innermost dim of a split for what is inside blocks (passes/moves.py). A batch axis
of a contraction enumerates blocks. Where it is the inner dim, the positions of the flat dim are
taken in the other order first, so that each block may keep places of its own. The numbers are the
same to the last bit. Which splits these are is read off the labels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .edit import hold
from .footprints import united
from .free_axes import Args
from .labels import propagate
from .normalize import split_from
from .pointwise import is_pointwise
from .values import Labels
from .visit import bind, op_name

aten = torch.ops.aten
SPLITS = {"reshape", "view", "_unsafe_view", "unflatten"}
TAKING = {"slice", "split", "split_with_sizes", "chunk", "getitem"}
RANKS = {"select": -1, "unbind": -1, "squeeze": -1, "unsqueeze": 1}
TURNING = {"mT", "movedim", "swapaxes", "einsum"}


def blocks_first(module: GraphModule, inputs: Args) -> GraphModule:
    """Turn the splits whose inner dim enumerates blocks (in place)."""
    splits = [n for n in module.graph.nodes if op_name(n) in SPLITS and _moves_last(n)]
    labels = propagate(module, inputs) if splits else Labels()
    if not labels.inside:
        return module
    shapes = {node: labels.values[node.args[0]].shape for node in splits}
    component = united(labels.count, labels.edges)
    batch = np.concatenate([component[array.numpy()].reshape(-1) for array in labels.inside])
    for node in splits:
        value, source = labels.values[node], shapes[node]
        held = value.arrays.get(len(value.shape) - 1)
        if held is not None and np.isin(component[held.numpy()], batch).any():
            _turn(module, node, value.shape, source)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _moves_last(node: Node) -> bool:
    """Whether the last dim of a result becomes another one before the dims are moved otherwise."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if _turns(user):
                return True
            if user not in seen and (
                op_name(user) in TAKING | SPLITS | RANKS.keys() or is_pointwise(user)
            ):
                seen.add(user)
                pending.append(user)
    return False


def _turns(node: Node) -> bool:
    """Whether a node makes the last dim of its source another one."""
    name, bound = op_name(node), bind(node, node.args, node.kwargs)
    if name == "permute":
        return bound["dims"][-1] not in (-1, len(bound["dims"]) - 1)
    if name == "transpose":
        return not {-1, _rank(node) - 1}.isdisjoint((bound["dim0"], bound["dim1"]))
    return name in TURNING


def _rank(node: Node) -> int:
    """The number of dims of a result; of nodes that were made, by what made them."""
    held, bound = node.meta.get("val"), bind(node, node.args, node.kwargs)
    if isinstance(held, Tensor):
        return held.dim()
    if "shape" in bound:
        return len(bound["shape"])
    more = len(bound["sizes"]) - 1 if "sizes" in bound else RANKS.get(op_name(node), 0)
    return _rank(node.all_input_nodes[0]) + more


def _turn(module: GraphModule, node: Node, shape: tuple[int, ...], source: tuple[int, ...]) -> None:
    """A slice of the inner dim is taken by itself; all of it for other users."""
    first, sizes = split_from(shape, source), _sizes(node)
    if first is None or not all(isinstance(n, int) for n in sizes[first - len(shape) :]):
        return
    first = len(source) - 1 if op_name(node) == "unflatten" else first
    places = torch.arange(source[-1]).view(shape[first:])
    for user in list(node.users):
        bounds = _along_last(user, len(shape))
        if bounds is None:
            user.replace_input_with(node, _taken(module, user, node, first, places))
        else:
            part = _taken(module, user, node, first, places[..., bounds])
            user.replace_all_uses_with(part)


def _along_last(node: Node, rank: int) -> slice | None:
    """Of a slice of the last of `rank` dims its constant bounds."""
    if op_name(node) != "slice":
        return None
    bound = bind(node, node.args, node.kwargs)
    bounds = (bound["start"], bound["end"], bound["step"])
    if (bound["dim"] or 0) % rank != rank - 1 or any(isinstance(n, Node) for n in bounds):
        return None
    return slice(*bounds)


def _sizes(node: Node) -> list[Any]:
    bound = bind(node, node.args, node.kwargs)
    return list(bound.get("sizes") or bound.get("shape") or bound["size"])


def _taken(module: GraphModule, user: Node, node: Node, first: int, places: Tensor) -> Node:
    """Places of the flat dim as [..., a, b], by way of [..., b, a]."""
    graph, turned, flat = module.graph, places.transpose(-1, -2), node.args[0]
    index = hold(module, user, f"_order_{node.name}_{user.name}", turned.reshape(-1))
    meta = {key: value for key, value in node.meta.items() if key != "val"}
    made: list[Node] = []
    with graph.inserting_before(user):
        if op_name(node) != "unflatten":
            whole = [*_sizes(node)[:first], -1]
            made.append(graph.call_function(aten.reshape.default, (flat, whole)))
            flat = made[-1]
        made.append(graph.call_function(aten.index_select.default, (flat, first, index)))
        sizes = list(turned.shape)
        made.append(graph.call_function(aten.unflatten.int, (made[-1], first, sizes)))
        made.append(graph.call_function(aten.transpose.int, (made[-1], -1, -2)))
    for new in made:
        new.meta = dict(meta)
    return made[-1]
