"""precision: a copy of a module that computes in a wider precision, weight by weight.

    f16(x) = f(x) + rounding, which grows with depth until it hides what a comparison looks for

Half-precision weights become promises that are widened where they are used (passes/lazy.py), so
that the copy holds one wide weight at a time; other weights are shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .lazy import Lazy, materialized, replace
from .skeleton import shared_copy

HALF = (torch.float16, torch.bfloat16)
Model = TypeVar("Model", bound=nn.Module)


def is_half(module: nn.Module) -> bool:
    """Whether a parameter is in half precision."""
    return any(held.dtype in HALF for held in module.parameters())


def widened(module: Model) -> Model:
    """A copy that computes in float32."""
    wide = shared_copy(module)
    if isinstance(wide, GraphModule):
        state_dtypes(wide, dict.fromkeys(HALF, torch.float32))
    replace(wide, lambda _, held: _promise(held) if held.dtype in HALF else None)
    for owner in wide.modules():
        for name, buffer in owner._buffers.items():
            if buffer is not None and buffer.dtype in HALF:
                owner._buffers[name] = buffer.float()
    return wide


def in_float32(module: Model) -> Model:
    """The same with all its weights at hand; the module itself where none is in half precision."""
    if not is_half(module):
        return module
    wide = widened(module)
    replace(wide, lambda _, held: materialized(held) if isinstance(held, Lazy) else None)
    return wide


def widened_inputs(args: Any) -> Any:
    """Inputs for it."""
    return pytree.tree_map(
        lambda v: v.float() if isinstance(v, Tensor) and v.dtype in HALF else v, args
    )


def state_dtypes(module: GraphModule, new: Mapping[torch.dtype, torch.dtype]) -> None:
    """Every dtype that is burned into the graph becomes what `new` has for it (in place), and a
    kernel of half precision the products that it stands for.
    """

    def burned(value: Any) -> bool:
        return isinstance(value, torch.dtype) and value in new

    found = False
    for node in module.graph.nodes:
        if node.target is torch.ops.aten._grouped_mm.default:
            node.target, found = _grouped_mm, True
        stated = (node.args, node.kwargs)
        if node.op == "call_function" and pytree.tree_any(burned, stated):
            node.args, node.kwargs = pytree.tree_map(lambda a: new[a] if burned(a) else a, stated)
            found = True
    if found:
        module.recompile()


def _grouped_mm(left: Tensor, right: Tensor, offs: Tensor | None = None, *_: Any) -> Tensor:
    """A product for each group; `offs` says where each ends along an axis that is not shared."""
    if offs is None:
        return left @ right
    ends, both = offs.tolist()[:-1], left.dim() == right.dim() == 2
    lefts = left.tensor_split(ends, int(both)) if left.dim() == 2 else left
    rights = right.tensor_split(ends, int(not both)) if right.dim() == 2 else right
    parts = [a @ b for a, b in zip(lefts, rights, strict=True)]
    return torch.stack(parts) if both else torch.cat(parts, left.dim() - 2)


def _promise(held: Tensor) -> Tensor:
    plain = held.detach()
    return Lazy(held.shape, torch.float32, lambda: materialized(plain).float(), device=held.device)
