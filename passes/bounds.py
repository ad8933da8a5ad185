"""bounds: the sizes that a graph was captured for, asserted by it.

    if ids.shape[1] > 8: ...         captured at 7: assert ids.shape[1] <= 8
    x.unflatten(1, (-1, 4))          assert x.shape[1] % 4 == 0
    if x.shape[0] == 1: ...          assert x.shape[0] > 1, if the numbers differ there
    h.sum((2, 3)) / (h.shape[2] * 7) assert x.shape[2] == 7, if it was captured for that alone

torch.export says what it found out of sizes in lines of Python. What tells of strides there is left
out: a graph for which that does not hold ends in an error. What holds from a size of two on goes
without saying, so the graph is compared with the model at a size of one as well.
"""

from __future__ import annotations

import ast
import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .visit import op_name

BOUND = "the graph was captured for"
_SIZE = re.compile(r"L(\[.+?\])\.size\(\)\[(\d+)\]")
_OPS: dict[type, Any] = {
    **{ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul},
    **{ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.Pow: operator.pow},
    **{ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge},
    **{ast.Eq: operator.eq, ast.NotEq: operator.ne},
}


def assert_sizes(
    module: GraphModule, forward: Callable[..., Any], args: Any, guards: list[str]
) -> None:
    """Let the graph assert what torch.export found out of the sizes of `forward`'s inputs, where
    that tells of ways in forward (in place).
    """
    inputs = module.graph.find_nodes(op="placeholder")
    places = dict(zip(map(id, pytree.tree_leaves(args)), inputs, strict=False))
    bound = inspect.signature(forward).bind(*args[0], **args[1]).arguments
    leaves = pytree.tree_flatten_with_path(dict(bound))[0]
    named = {pytree.keystr(path): places.get(id(leaf)) for path, leaf in leaves}
    for guard in sorted(guards, key=len):
        sizes: dict[str, tuple[Node, int]] = {}
        for path, dim in dict.fromkeys(_SIZE.findall(guard)):
            sizes[f"L{path}.size()[{dim}]"] = (named[path], int(dim))
        _assert(module, guard, sizes)
    module.recompile()


def assert_axes(
    module: GraphModule, args: Any, axes: dict[int, list[int]], more_than_one: bool
) -> None:
    """Let the graph assert that axes (by the position of the input) are as long as in `args`, or
    longer than one (in place).
    """
    inputs = module.graph.find_nodes(op="placeholder")
    leaves = pytree.tree_leaves(args)
    for position, dims in axes.items():
        for dim in dims:
            said = "> 1" if more_than_one else f"== {leaves[position].shape[dim]}"
            _assert(module, f"size {said}", {"size": (inputs[position], dim)})
    module.recompile()


def _assert(module: GraphModule, guard: str, sizes: dict[str, tuple[Node, int]]) -> None:
    names = {f"size_{k}_": place for k, place in enumerate(sizes.values())}
    for name, text in zip(names, sizes, strict=True):
        guard = guard.replace(text, name)
    tree = ast.parse(guard, mode="eval").body
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    graph = module.graph
    anchor = [n for n in graph.nodes if n.op == "placeholder" or is_bound(n)][-1].next
    for part in filter(_tells, parts):
        said = ast.unparse(part)
        for name, (node, dim) in names.items():
            said = said.replace(name, f"{node.name}.shape[{dim}]")
        text = f"{BOUND} {said}: forward computes otherwise, or not at all, at other sizes"
        with graph.inserting_before(anchor):
            condition = _node(graph, part, names)
            graph.call_function(torch.ops.aten._assert_scalar.default, (condition, text))


def _tells(tree: ast.expr) -> bool:
    """Whether a condition tells of a way in forward, and not of how memory is laid out: no sizes
    multiplied or divided by each other, no least size, no part of a size that is none or one.
    """
    if not isinstance(tree, ast.Compare) or len(tree.ops) != 1:
        return False
    parts = list(ast.walk(tree))
    for part in parts:
        if isinstance(part, (ast.Call, ast.BoolOp, ast.IfExp)):
            return False
        if isinstance(part, ast.BinOp) and not isinstance(part.op, (ast.Add, ast.Sub)):
            divides = isinstance(part.op, (ast.Mod, ast.FloorDiv))
            if _sizes(part.right) and (divides or _sizes(part.left)):
                return False
    limits = [
        side.value for side in (tree.left, *tree.comparators) if isinstance(side, ast.Constant)
    ]
    if any(isinstance(part, ast.FloorDiv) for part in parts):
        return any(isinstance(limit, int) and limit > 2 for limit in limits)
    return True


def _sizes(tree: ast.expr) -> bool:
    return any(isinstance(part, ast.Name) for part in ast.walk(tree))


def _node(graph: Graph, tree: ast.expr, names: dict[str, tuple[Node, int]]) -> Any:
    """A node that computes what an expression of sizes says."""
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        node, dim = names[tree.id]
        size = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
        size.meta["val"] = node.meta["val"].shape[dim]
        return size
    if isinstance(tree, ast.UnaryOp):
        return graph.call_function(operator.neg, (_node(graph, tree.operand, names),))
    if isinstance(tree, ast.BinOp):
        op, sides = _OPS[type(tree.op)], [tree.left, tree.right]
    else:
        assert isinstance(tree, ast.Compare)
        op, sides = _OPS[type(tree.ops[0])], [tree.left, *tree.comparators]
    return graph.call_function(op, tuple(_node(graph, side, names) for side in sides))


def is_bound(node: Node) -> bool:
    """Whether a node asserts the sizes that the graph was captured for."""
    return op_name(node) == "_assert_scalar" and str(node.args[-1]).startswith(BOUND)


def bounds(module: GraphModule) -> list[str]:
    """What the graph asserts of sizes: `ids.shape[1] <= 8`."""
    said = (str(n.args[-1]) for n in module.graph.nodes if is_bound(n))
    return list(dict.fromkeys(text.removeprefix(BOUND).split(":")[0].strip() for text in said))
