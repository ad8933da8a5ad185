"""capture: model + example inputs -> one cleaned torch.fx graph whose numbers equal the model's.

torch.export, non-strict, under no_grad, on a copy in eval mode. Integer inputs (tokens, masks) are
dynamic in
every axis, other inputs in the first; what the model specialises is taken as it is. The result is
accepted only
if it equals eager at the sample size and, where an axis is dynamic, at another one.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .normalize import normalize

Args = tuple[tuple[Any, ...], dict[str, Any]]
_NO_OP = {
    torch.ops.aten._assert_tensor_metadata.default,
    torch.ops.aten._assert_scalar.default,
    torch.ops.aten.sym_constrain_range_for_size.default,
}
_IDENTITY = {
    torch.ops.aten.alias.default,
    torch.ops.aten.detach.default,
    torch.ops.aten.detach_.default,
    torch.ops.aten.dropout.default,
    torch.ops.aten.lift_fresh_copy.default,
}


@dataclass(frozen=True)
class Captured:
    """A captured program.

    `graph_module` holds parameters under the user's names (tied ones as one object) and is called
    like the model;
    `inputs` are the fresh copies it was captured with; `dynamic_shapes` is what torch.export
    accepted (None: static).
    """

    graph_module: GraphModule
    inputs: Args
    dynamic_shapes: Any


def as_args(inputs: Any) -> Args:
    """A tensor, a tuple (positional) or a mapping (keyword) as (args, kwargs) of fresh
    contiguous tensors.
    """
    if isinstance(inputs, Mapping):
        args: Args = ((), dict(inputs))
    elif isinstance(inputs, (tuple, list)):
        args = (tuple(inputs), {})
    else:
        args = ((inputs,), {})

    def fresh(value: Any) -> Any:
        return value.detach().clone().contiguous() if isinstance(value, Tensor) else value

    return pytree.tree_map(fresh, args)


def capture(model: nn.Module, inputs: Any) -> Captured:
    """Capture `model` at `inputs`; CaptureError names the cause. The model is not changed."""
    args = as_args(inputs)
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args)):
        raise CaptureError(
            "inputs hold no tensor · help: pass a tensor, a tuple or a dict of tensors"
        )
    quantised = [n for n, p in model.named_parameters() if not p.dtype.is_floating_point]
    if quantised:
        raise CaptureError(
            f"parameter {quantised[0]} is not floating point: quantised models cannot be pruned · "
            "help: prune first, then quantise"
        )
    model = copy.deepcopy(model).eval()
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "use_cache", None):
        config.use_cache = False
    shapes = _dynamic_shapes(args)
    error: Exception | None = None
    for attempt in (shapes, None):
        try:
            with torch.no_grad():
                program = torch.export.export(
                    model, args[0], args[1], dynamic_shapes=attempt, strict=False
                )
            module = normalize(clean(program.module(check_guards=False)))
            _check(module, model, args, attempt is not None)
            return Captured(module, args, attempt)
        except Exception as failure:
            error = failure
            if attempt is None:
                break
    raise CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {str(error).strip()[:800]} · "
        f"help: the forward "
        "must not branch on data; try other example inputs, or prune the part of the model "
        "that can be captured"
    ) from error


def _dynamic_shapes(args: Args) -> Any:
    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        free = range(value.dim()) if not value.is_floating_point() else range(min(1, value.dim()))
        return {axis: Dim.AUTO for axis in free if value.shape[axis] > 1}

    positional, keyword = pytree.tree_map(axes, args)
    return (*positional,) if not keyword else ({**keyword} if not positional else None)


def clean(module: GraphModule) -> GraphModule:
    """Inline wrapper ops, drop assertions, guards and no-ops, turn view into reshape."""
    module._forward_pre_hooks.clear()
    module._forward_pre_hooks_with_kwargs.clear()
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_module" and not node.users and "guards" in str(node.target):
            graph.erase_node(node)
        elif node.op == "call_function" and getattr(node.target, "__name__", "").startswith(
            "wrap_with"
        ):
            _inline(module, node)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NO_OP:
            graph.erase_node(node)
        elif node.target in _IDENTITY:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def _inline(module: GraphModule, node: Node) -> None:
    position = next(
        i for i, arg in enumerate(node.args) if isinstance(arg, Node) and arg.op == "get_attr"
    )
    body_node = node.args[position]
    assert isinstance(body_node, Node)
    body = getattr(module, str(body_node.target))
    env: dict[Node, Any] = {}
    operands = list(node.args[position + 1 :])
    with module.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                env[inner] = operands.pop(0)
            elif inner.op == "output":
                result = torch.fx.map_arg(inner.args[0], lambda n: env[n])
            else:
                env[inner] = module.graph.node_copy(inner, lambda n: env[n])
    for user in list(node.users):
        if isinstance(result, (tuple, list)):
            user.replace_all_uses_with(result[user.args[1]])
            module.graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(result)
    module.graph.erase_node(node)


def _check(module: GraphModule, model: nn.Module, args: Args, dynamic: bool) -> None:
    """Equal numbers at the sample size and, for dynamic graphs, at twice the batch."""
    sizes = [args]
    if dynamic:
        doubled = pytree.tree_map(
            lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() and len(v) > 1 else v,
            args,
        )
        sizes.append(doubled)
    for positional, keyword in sizes:
        if any(p.is_meta or type(p).__name__ == "FakeTensor" for p in model.parameters()):
            return
        with torch.no_grad():
            expected = tensors(model(*positional, **keyword))
            actual = tensors(module(*positional, **keyword))
        for left, right in zip(expected, actual, strict=True):
            if not torch.allclose(
                left.double(), right.double(), rtol=1e-3, atol=1e-4, equal_nan=True
            ):
                raise CaptureError("the captured graph computes other numbers than the model")


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order."""
    if not isinstance(output, (Tensor, tuple, list, dict)) and hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
