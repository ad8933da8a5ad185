"""free axes: which axes of the inputs may have other sizes in the captured graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

Args = tuple[tuple[Any, ...], dict[str, Any]]


def attempts(model: nn.Module, args: Args) -> Iterator[Any]:
    """Dynamic axes to ask for: all that may be, then the batch only, then none."""
    for batch_only in (False, True):
        shapes = _dynamic_shapes(model, args, batch_only)
        if shapes is not None:
            yield shapes
    yield None


def _dynamic_shapes(model: nn.Module, args: Args, batch_only: bool) -> Any:
    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        every = not (value.is_floating_point() or batch_only)
        free = range(value.dim()) if every else range(min(1, value.dim()))
        return {axis: Dim.AUTO for axis in free if value.shape[axis] > 1}

    positional, keyword = pytree.tree_map(axes, args)
    if not keyword:
        return tuple(positional)
    names = list(inspect.signature(model.forward).parameters)[: len(positional)]
    return {**dict(zip(names, positional, strict=True)), **keyword}


def free_axes(module: GraphModule, args: Args) -> dict[int, list[int]]:
    """Axes that stayed dynamic, by the position of the input among the inputs' leaves."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    found = {}
    for position, node in enumerate(inputs[: len(pytree.tree_leaves(args))]):
        value = node.meta.get("val")
        shape = value.shape if isinstance(value, Tensor) else ()
        axes = [axis for axis, size in enumerate(shape) if _is_open(size)]
        if axes:
            found[position] = axes
    return found


def _is_open(size: Any) -> bool:
    """Whether a size is no number, nor a symbol that turned out to be one."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def static_axes(args: Args, free: dict[int, list[int]]) -> dict[int, list[int]]:
    """Axes longer than one that did not stay dynamic, by the position of the input."""
    return {
        position: [a for a, n in enumerate(leaf.shape) if n > 1 and a not in free.get(position, ())]
        for position, leaf in enumerate(pytree.tree_leaves(args))
        if isinstance(leaf, Tensor)
    }


def resized(args: Args, axes: dict[int, list[int]], size: Callable[[int], int]) -> Args:
    """The inputs with `size(n)` positions, the first ones or repeated, of these axes of n."""
    leaves, spec = pytree.tree_flatten(args)
    for position, dims in axes.items():
        for dim in dims:
            held = leaves[position]
            count = size(held.shape[dim])
            held = torch.cat([held] * -(-count // held.shape[dim]), dim)
            leaves[position] = held.narrow(dim, 0, count).contiguous()
    return pytree.tree_unflatten(leaves, spec)


def enlarged(args: Args, factor: int, free: dict[int, list[int]]) -> Args:
    """The inputs, `factor` times as long along their free axes (repeated)."""
    leaves, spec = pytree.tree_flatten(args)
    for position, axes in free.items():
        for axis in axes:
            leaves[position] = torch.cat([leaves[position]] * factor, axis)
    return pytree.tree_unflatten(leaves, spec)
