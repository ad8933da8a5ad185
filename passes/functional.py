"""functional: in-place ops on fresh temporaries become the functional ops they abbreviate.

    x = relu(y); x.add_(z)            x = relu(y); x1 = add(x, z)        later uses of x read x1
    x = zeros(..); x[:, 1:].copy_(z)  x1 = slice_scatter(x, z, ...)         and so on, outwards

Safe only if nobody else can see the write: x comes from an op that returns new memory, and no
view of x that was taken before is read after. Anything else stays in place; the analysis then
freezes what the op touches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from .visit import bind

aten = torch.ops.aten
PLACES = {"index", "indices"}  # arguments that say where


def functionalise(graph: Graph) -> None:
    """Replace every in-place op that provably acts on a temporary."""
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if not is_inplace(node):
            continue
        target = node.args[0]
        if not isinstance(target, Node):
            continue
        if _fresh(target) and _unseen(target, node, order):
            _replace(graph, node, target, order)
        elif _partial(target) and len(target.users) <= 2:
            _replace_scatter(graph, node, target, order)


def is_inplace(node: Node) -> bool:
    """Whether the op writes into its first argument."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    written = [a for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return (
        bool(written)
        and written[0] is arguments[0]
        or bool(written and written[0].name == arguments[0].name)
    )


def written(graph: Graph) -> set[str]:
    """Names of buffers (or other attributes) that the graph writes into."""
    targets = [node.args[0] for node in graph.nodes if is_inplace(node)]
    return {str(t.target) for t in targets if isinstance(t, Node) and t.op == "get_attr"}


def _aliases(node: Node) -> bool:
    """Whether the op's result may share memory with an argument."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return True
    schema = node.target._schema
    if any(r.alias_info is not None for r in schema.returns):
        return True
    return schema.name.removeprefix("aten::") in {
        "reshape",
        "contiguous",
        "to",
        "flatten",
        "type_as",
        "dropout",
        "reshape_as",
        "expand_as",
        "chunk",
    }


def _fresh(node: Node) -> bool:
    """The result is new memory, or the only view of new memory."""
    if node.op != "call_function":
        return False
    if not _aliases(node):
        return True
    source = node.args[0] if node.args else None
    return isinstance(source, Node) and len(source.users) == 1 and _fresh(source)


def _unseen(target: Node, write: Node, order: dict[Node, int]) -> bool:
    """No alias of `target` taken before the write is read after it."""
    before = [user for user in target.users if order[user] < order[write]]
    return not any(_aliases(user) and _lives(user, write, order) for user in before)


def _lives(alias: Node, write: Node, order: dict[Node, int]) -> bool:
    for user in alias.users:
        if order.get(user, 0) > order[write] or (user is write and user.args[0] is not alias):
            return True
        if _aliases(user) and _lives(user, write, order):
            return True
    return False


def _functional(node: Node) -> Any:
    """The overload without the write, or None."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    packet = getattr(aten, name.removesuffix("_"), None)
    return getattr(packet, node.target._overloadname, None) if name.endswith("_") else None


def _new_value(graph: Graph, node: Node, base: Node) -> Node | None:
    """A node that computes what the in-place `node` leaves in `base`'s place."""
    assert isinstance(node.target, torch._ops.OpOverload)
    name = node.target._schema.name.removeprefix("aten::")
    if name in ("copy_", "fill_", "zero_"):
        return _overwritten(graph, node, name, base)
    overload = _functional(node)
    if overload is None or not _same_type(node, base):
        return None
    made = graph.call_function(overload, (base, *node.args[1:]), dict(node.kwargs))
    made.meta = dict(node.meta)
    return made


def _same_type(node: Node, base: Node) -> bool:
    """In-place ops keep the dtype; their functional forms may promote it."""
    held, bound = base.meta.get("val"), bind(node, node.args, node.kwargs)
    read = [leaf for name, a in bound.items() if name not in PLACES for leaf in tree_leaves(a)]
    others = [a.meta.get("val") for a in read if isinstance(a, Node) and a is not base]
    if held is None:
        return False
    return all(
        not isinstance(o, torch.Tensor) or torch.result_type(held, o) == held.dtype for o in others
    ) or "mask" in str(node.target)


def _overwritten(graph: Graph, node: Node, name: str, base: Node) -> Node | None:
    held = base.meta.get("val")
    if held is None:
        return None
    if name == "copy_":
        source = node.args[1]
        given = source.meta.get("val") if isinstance(source, Node) else None
        if given is None or given.dtype != held.dtype or given.shape != held.shape:
            return None
        made = graph.call_function(aten.clone.default, (source,))
    else:
        value = node.args[1] if name == "fill_" else 0
        op = aten.fill.Tensor if isinstance(value, Node) else aten.full_like.default
        made = graph.call_function(op, (base, value))
    made.meta = dict(node.meta)
    return made


def _replace(graph: Graph, node: Node, target: Node, order: dict[Node, int]) -> None:
    with graph.inserting_before(node):
        made = _new_value(graph, node, target)
    if made is None:
        return
    order[made] = order[node]
    node.replace_all_uses_with(made)
    target.replace_all_uses_with(
        made, delete_user_cb=lambda user: user is not made and order[user] > order[node]
    )
    graph.erase_node(node)


def _partial(target: Node) -> bool:
    """A slice or select of a fresh temporary, or of a slice of one, read by no one else."""
    views = _views(target)
    root = views[-1].args[0] if views else None
    return isinstance(root, Node) and _fresh(root)


def _views(target: Node) -> list[Node]:
    """The slices and selects from `target` back to the tensor that they are parts of."""
    views: list[Node] = []
    at: Any = target
    while isinstance(at, Node) and at.target in (aten.slice.Tensor, aten.select.int):
        views.append(at)
        at = at.args[0]
    return views


def _replace_scatter(graph: Graph, node: Node, target: Node, order: dict[Node, int]) -> None:
    views = _views(target)
    base = views[-1].args[0]
    assert isinstance(base, Node)
    if any(order[user] > order[node] for view in views for user in view.users if user is not node):
        return
    wider = zip([*views[1:], base], views, strict=True)
    if not all(_only_view(whole, view, node, order) for whole, view in wider):
        return
    with graph.inserting_before(node):
        part = made = _new_value(graph, node, target)
        if part is None or made is None:
            return
        order[part] = order[node]
        for view in views:
            whole = view.args[0]
            one = view.target is aten.select.int
            scatter = aten.select_scatter if one else aten.slice_scatter
            made = graph.call_function(scatter.default, (whole, made, *view.args[1:]))
            made.meta = dict(whole.meta)  # type: ignore[union-attr]
            order[made] = order[node]
    last = made
    base.replace_all_uses_with(
        last, delete_user_cb=lambda user: user is not last and order[user] > order[node]
    )
    node.replace_all_uses_with(part)
    graph.erase_node(node)


def _only_view(base: Node, view: Node, write: Node, order: dict[Node, int]) -> bool:
    before = [u for u in base.users if order[u] < order[write] and u is not view]
    return not any(_aliases(user) and _lives(user, write, order) for user in before)
