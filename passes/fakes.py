"""Shapes of results without numbers: what torch.export recorded, at the sizes of the example.

All of them are on the CPU, wherever the model is: the analysis runs there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymBool, SymInt, Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.utils import _pytree as pytree

from .errors import UnsupportedOp, where
from .lazy import Lazy
from .values import Value

ANY = 5  # places of which numbers decide how many there are


def as_fake(fakes: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake tensor of this mode with the tensor's shape, strides and dtype, on the CPU."""
    foreign = isinstance(tensor, FakeTensor) and tensor.fake_mode is not fakes
    if foreign or isinstance(tensor, Lazy) or tensor.device.type != "cpu":
        with fakes:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return tensor if isinstance(tensor, FakeTensor) else fakes.from_tensor(tensor)


def executed(fakes: FakeTensorMode, node: Node, args: Any) -> Any:
    """Results as fake tensors at the example's sizes: recorded by torch.export, else run."""
    recorded = _from_meta(node, fakes)
    if recorded is not None:
        return recorded
    plain = pytree.tree_map(
        lambda v: v.fake if isinstance(v, Value) else v,
        args,
        is_leaf=lambda v: isinstance(v, Value),
    )
    try:
        with fakes, torch.no_grad():
            return node.target(*plain[0], **plain[1])  # type: ignore[operator]
    except DataDependentOutputException as error:
        raise UnsupportedOp(
            f"a size is computed from the numbers in a tensor · {where(node)} · help: prune the "
            "part of the model whose sizes follow from those of its inputs"
        ) from error
    except Exception as error:
        raise UnsupportedOp(
            f"cannot infer the shape of {node.target}: {error} · {where(node)} · help: a custom op "
            "needs torch.library.register_fake"
        ) from error


def real_like(item: Any) -> Any:
    """A creation op reads only the dtype of its first argument."""
    if isinstance(item, FakeTensor):
        return torch.empty(0, dtype=item.dtype)
    return item


def _from_meta(node: Node, fakes: FakeTensorMode) -> Any:
    """What torch.export recorded, at the sizes of the example; None where a size has none."""
    value = node.meta.get("val")
    leaves = pytree.tree_leaves(value)
    if value is None or not all(isinstance(leaf, Tensor) for leaf in leaves):
        return None
    sizes = [[_hint(n) for n in leaf.shape] for leaf in leaves]
    if any(n is None for shape in sizes for n in shape):
        return None
    with fakes:
        made = [
            torch.empty(shape, dtype=leaf.dtype)  # type: ignore[arg-type]
            for shape, leaf in zip(sizes, leaves, strict=True)
        ]
    return made[0] if isinstance(value, Tensor) else made


def _hint(size: Any) -> int | None:
    """A size at the example; one that numbers decide (nonzero) is any size."""
    if isinstance(size, int) or size.node.hint is not None:
        return size if isinstance(size, int) else size.node.hint
    from sympy import Integer

    at = size.node.expr.xreplace(dict.fromkeys(unknowns(size), Integer(ANY)))
    return int(at) if at.is_number else None


def unknowns(held: Any) -> set[Any]:
    """Symbols in sizes, or in those of tensors, for what only numbers in tensors tell."""
    leaves = pytree.tree_leaves(held)
    if not any(isinstance(leaf, (Tensor, SymInt, SymBool)) for leaf in leaves):
        return set()
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # slow to import

    return set().union(*map(free_unbacked_symbols, leaves))
