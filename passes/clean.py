"""clean: an exported graph without what the analysis need not see.

    wrapper ops (set_grad, autocast)         inlined, to any depth
    assertions, guards                       dropped
    ops that change nothing at these dtypes  dropped (alias, detach, dropout, to, contiguous, slice)
    view                                     reshape: no later step depends on strides
    other orders of dims (mT, movedim...)    permute
    narrow                                   slice
    broadcast_tensors                        expand, of each
    min, max of two tensors                  minimum, maximum
    rms_norm without an epsilon              the one of the dtype it computes in
    in-place ops on fresh temporaries        their functional form (passes/functional.py)

Every step keeps the numbers; what is not provably without effect stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from .branches import is_own
from .functional import functionalise, is_inplace
from .visit import bind, op_name

aten = torch.ops.aten
_ASSERTIONS = {
    "_assert_tensor_metadata",
    "_assert_scalar",
    "_assert_async",
    "sym_constrain_range_for_size",
    "sym_constrain_range",
}
_IDENTITY = {
    "alias",
    "detach",
    "detach_",
    "dropout",
    "dropout_",
    "feature_dropout",
    "alpha_dropout",
    "lift_fresh",
}
_OTHER_NAMES = {  # one name for one function: the rules of `min` are those of a reduction
    aten.view.default: aten.reshape.default,
    aten._unsafe_view.default: aten.reshape.default,
    aten.concat.default: aten.cat.default,
    aten.concatenate.default: aten.cat.default,
    aten.min.other: aten.minimum.default,
    aten.max.other: aten.maximum.default,
}
_ORDERING = {"mT", "numpy_T", "movedim", "swapaxes", "einsum"}
_MOVES = {"transpose", "permute", "transpose_"}


def clean(module: GraphModule) -> GraphModule:
    """Clean `module` in place and return it."""
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks_with_kwargs.clear()
    _inline_wrappers(module)
    for node in list(module.graph.nodes):
        guards = node.op == "call_module" and not node.users and "guards" in str(node.target)
        if guards or (op_name(node) in _ASSERTIONS and not is_own(node)):
            module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        _simplify(module.graph, node)
    functionalise(module.graph)
    _drop_copies(module.graph)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def _drop_copies(graph: Graph) -> None:
    """Constants are copied so that in-place ops do not spoil them; without such ops, no need."""
    if any(is_inplace(node) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if op_name(node) == "lift_fresh_copy":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _simplify(graph: Graph, node: Node) -> None:
    if _changes_nothing(node):
        node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
        graph.erase_node(node)
        return
    node.target = _OTHER_NAMES.get(node.target, node.target)  # type: ignore[arg-type]
    if order := _order(node):
        node.target, node.kwargs = aten.permute.default, {}
        node.args = (*node.all_input_nodes, order)
    if own := _FORMS.get(op_name(node)):
        own(graph, node)


def _with_epsilon(graph: Graph, node: Node) -> None:
    if (bound := _bound(node))["eps"] is None:
        computed = torch.promote_types(node.meta["val"].dtype, torch.float32)
        node.args = (*(bound[name] for name in ("input", "normalized_shape", "weight")),)
        node.kwargs = {"eps": torch.finfo(computed).eps}


def _as_slice(graph: Graph, node: Node) -> None:
    source, dim, start, length = _bound(node).values()
    if isinstance(start, int) and isinstance(length, int) and start >= 0:
        node.target, node.kwargs = aten.slice.Tensor, {}
        node.args = (source, dim, start, start + length)


def _of_a_copy(graph: Graph, node: Node) -> None:
    """The op refuses odd strides, which a cut may leave."""
    source = node.args[0]
    assert isinstance(source, Node)
    with graph.inserting_before(node):
        copied = graph.call_function(
            aten.clone.default, (source,), {"memory_format": torch.contiguous_format}
        )
    copied.meta = dict(source.meta)
    node.replace_input_with(source, copied)


def _reshape(graph: Graph, node: Node) -> None:
    if _follows_attention(node):
        _of_a_copy(graph, node)


def _order(node: Node) -> list[int]:
    """The order that an op puts the dims of a tensor in, if it does no more: sizes tell dims."""
    tensors = [leaf for leaf in pytree.tree_leaves(node.args) if isinstance(leaf, Node)]
    held = tensors[0].meta.get("val") if op_name(node) in _ORDERING and len(tensors) == 1 else None
    if not isinstance(held, Tensor):
        return []
    sizes = range(2, 2 + held.dim())
    args = torch.fx.map_arg(node.args, lambda _: torch.empty(*sizes, device="meta"))
    try:
        made = node.target(*args)  # type: ignore[operator]
    except RuntimeError:  # a letter twice in an operand of einsum
        return []
    order = [size - 2 for size in made.shape]
    return order if len(order) == len(sizes) else []


def _expand_each(graph: Graph, node: Node) -> None:
    """Each tensor as large as all of them together."""
    given: Any = node.args[0]
    shapes = [each.meta["val"].shape for each in given]
    for user in list(node.users):
        held, shape = given[user.args[1]], user.meta["val"].shape  # type: ignore[index]
        own = (1,) * (len(shape) - held.meta["val"].dim()) + tuple(held.meta["val"].shape)
        sizes: list[Any] = [-1 if str(a) == str(b) else b for a, b in zip(own, shape, strict=True)]
        with graph.inserting_before(node):
            for dim, size in enumerate(sizes):
                if not isinstance(size, int):
                    back, owners = dim - len(shape), zip(given, shapes, strict=True)
                    owner = next(
                        n for n, s in owners if len(s) >= -back and str(s[back]) == str(size)
                    )
                    sizes[dim] = graph.call_function(aten.sym_size.int, (owner, back))
                    sizes[dim].meta["val"] = size
            new = graph.call_function(aten.expand.default, (held, sizes))
        new.meta = dict(user.meta)
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)


def _without_empty(graph: Graph, node: Node) -> None:
    """Parts of no place are none of what is joined."""
    bound = _bound(node)
    values = [part.meta.get("val") for part in bound["tensors"]]
    if not all(isinstance(value, Tensor) for value in values):
        return
    if len({(value.dtype, value.dim()) for value in values}) > 1:
        return
    sizes = [value.shape[bound["dim"]] for value in values]
    empty = [isinstance(size, int) and size == 0 for size in sizes]
    held = [part for part, none in zip(bound["tensors"], empty, strict=True) if not none]
    if held and any(empty):
        node.args, node.kwargs = (held, bound["dim"]), {}


def _follows_attention(node: Node) -> bool:
    """Attention kernels return other strides than their decompositions: a view of the result
    is not safe later, a view of a contiguous copy is.
    """
    source = node.args[0]
    while isinstance(source, Node) and op_name(source) in _MOVES:
        source = source.args[0]
    return isinstance(source, Node) and op_name(source) == "scaled_dot_product_attention"


def _changes_nothing(node: Node) -> bool:
    name = op_name(node)
    if name in _IDENTITY:
        return not (name.endswith("dropout") and _bound(node).get("train") is True)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return False
    before, after = source.meta.get("val"), node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    if name in ("to", "_to_copy", "type_as", "float"):
        kept = before.dtype == after.dtype and before.device == after.device
        return kept and before.stride() == after.stride() and not _bound(node).get("copy")
    if name == "contiguous":
        return before.is_contiguous() and not node.kwargs
    return name == "slice" and _whole(node, before.shape[_bound(node)["dim"] or 0])


def _whole(node: Node, size: Any) -> bool:
    """A slice from the first to the last of `size` positions."""
    bound = _bound(node)
    end, known = bound["end"], isinstance(size, int)
    if bound["step"] != 1 or bound["start"] not in (None, 0):
        return False
    return end is None or (isinstance(end, int) and (end >= 2**62 or (known and end >= size)))


def _bound(node: Node) -> dict[str, Any]:
    return bind(node, node.args, node.kwargs)


_FORMS: dict[str, Callable[[Graph, Node], None]] = {
    "rms_norm": _with_epsilon,
    "cat": _without_empty,
    "broadcast_tensors": _expand_each,
    "narrow": _as_slice,
    "view_as_complex": _of_a_copy,
    "reshape": _reshape,
}


# ---------------------------------------------------------------- wrappers
def _inline_wrappers(module: GraphModule) -> None:
    """Inline until none is left: a wrapper's body may hold wrappers."""
    while True:
        found = [n for n in module.graph.nodes if n.op == "call_function" and _is_wrapper(n)]
        if not found:
            return
        for node in found:
            _inline(module, node)


def _is_wrapper(node: Node) -> bool:
    return getattr(node.target, "__name__", "").startswith("wrap_with") and any(
        isinstance(arg, Node) and arg.op == "get_attr" for arg in node.args
    )


def _inline(module: GraphModule, node: Node) -> None:
    position, body_node = next(
        (i, arg)
        for i, arg in enumerate(node.args)
        if isinstance(arg, Node) and arg.op == "get_attr"
    )
    body = operator.attrgetter(str(body_node.target))(module)
    env: dict[Node, Any] = {}
    operands = iter(node.args[position + 1 :])
    result: Any = None
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = next(operands)
            elif inner.op == "output":
                result = torch.fx.map_arg(inner.args[0], env.__getitem__)
            else:
                env[inner] = module.graph.node_copy(inner, env.__getitem__)
            if inner.op == "get_attr":
                env[inner].target = _hoisted(module, body, str(inner.target))
    for user in list(node.users):
        if isinstance(result, (tuple, list)) and user.target is operator.getitem:
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _hoisted(module: GraphModule, body: GraphModule, target: str) -> str:
    """Give an attribute of the body a name in the outer module."""
    held = operator.attrgetter(target)(body)
    number = 0
    while hasattr(module, f"inlined_{number}"):
        number += 1
    setattr(module, f"inlined_{number}", held)
    return f"inlined_{number}"
