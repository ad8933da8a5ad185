"""held: integer inputs that forward computes sizes from, held as constants while it is exported.

lengths = grid.prod(-1).tolist()      numbers of the example; x.split(lengths) has sizes

The graph is for those numbers alone: it asserts them, and refuses others.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .tracing import CONSTANTS, real_or_complex

aten = torch.ops.aten
_SAME = {False: operator.eq, True: operator.is_}
MAKING = {torch.arange, torch.zeros, torch.ones, torch.full, torch.div}
PLAIN = (int, float, str, torch.Size, torch.dtype, torch.device, torch.layout)
HELD = "_held_"  # the names of such constants begin so
FEW = 3  # integer inputs that are held as constants one by one, before all are


def holdable(args: Any) -> list[frozenset[int]]:
    """Sets of integer inputs (by their position among the leaves) to hold as constants, the fewest
    and smallest first, from none on to FEW, then all. Something else is left to vary.
    """
    leaves = pytree.tree_leaves(args)
    whole = [k for k, v in enumerate(leaves) if isinstance(v, Tensor) and not real_or_complex(v)]
    whole.sort(key=lambda k: (leaves[k].numel(), k))
    varied = any(isinstance(leaf, Tensor) and real_or_complex(leaf) for leaf in leaves)
    chosen = [k for k in (whole if varied else whole[:-1]) if leaves[k].numel() <= CONSTANTS]
    counts = sorted({*range(min(len(chosen), FEW) + 1), len(chosen)})
    return [frozenset(chosen[:n]) for n in counts]


def with_held(forward: Callable[..., Any], args: Any, held: frozenset[int]) -> Callable[..., Any]:
    """`forward` that takes the integer inputs `held` for the constants that they are in `args`, and
    what it makes of numbers alone for constants as well.
    """
    leaves = pytree.tree_leaves(args)
    numbers = {k: (leaves[k].tolist(), leaves[k].dtype, leaves[k].shape) for k in held}

    def with_constants(*positional: Any, **keyword: Any) -> Any:
        leaves, spec = pytree.tree_flatten((positional, keyword))
        for k, (values, dtype, shape) in numbers.items():
            constant = torch.tensor(values, dtype=dtype, device=leaves[k].device)
            leaves[k] = constant.reshape(shape)
        positional, keyword = pytree.tree_unflatten(leaves, spec)
        with _Made():
            return forward(*positional, **keyword)

    return with_constants


class _Made(TorchFunctionMode):
    """Tensors that are made of plain numbers (arange, ones) are constants of the trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [a for a in pytree.tree_leaves((args, kwargs)) if a is not None]
        if func in MAKING and all(isinstance(a, PLAIN) for a in given):
            with _disable_current_modes():
                made = func(*args, **kwargs)
            if made.numel() <= CONSTANTS:
                constant = torch.tensor(made.tolist(), dtype=made.dtype, device=made.device)
                return constant.reshape(made.shape)
        return func(*args, **kwargs)


def assert_held(module: GraphModule, args: Any, held: frozenset[int]) -> None:
    """Let the graph assert that the inputs `held` are what they are in `args` (in place)."""
    leaves = pytree.tree_leaves(args)
    inputs = module.graph.find_nodes(op="placeholder")
    for k in sorted(held):
        name = f"{HELD}{inputs[k].name}"
        module.register_buffer(name, leaves[k].clone(), persistent=False)
        with module.graph.inserting_after(inputs[-1]):
            constant = module.graph.get_attr(name)
        shape = list(leaves[k].shape)
        with module.graph.inserting_after(constant):
            whole = module.graph.call_function(aten.reshape.default, (inputs[k], shape))
        with module.graph.inserting_after(whole):
            same = module.graph.call_function(aten.eq.Tensor, (whole, constant))
        with module.graph.inserting_after(same):
            everywhere = module.graph.call_function(aten.all.default, (same,))
        with module.graph.inserting_after(everywhere):
            said = (
                f"{inputs[k].name} is not what it was in the example inputs, which is all that the "
                "graph was captured for: forward computes sizes from its numbers"
            )
            module.graph.call_function(aten._assert_async.msg, (everywhere, said))
        constant.meta["val"] = whole.meta["val"] = leaves[k]
        same.meta["val"] = leaves[k] == leaves[k]
        everywhere.meta["val"] = same.meta["val"].all()
    module.recompile()


def assert_constants(module: GraphModule, args: Any) -> None:
    """Let the graph assert that inputs which are no tensors are what they are in `args`: torch
    traced for those alone (in place).
    """
    leaves = pytree.tree_leaves(args)
    inputs = module.graph.find_nodes(op="placeholder")
    for node, leaf in zip(inputs, leaves, strict=False):
        if not isinstance(leaf, (bool, int, float, str, type(None))):
            continue
        said = f"{node.name} is not {leaf!r}, for which alone the graph was captured"
        with module.graph.inserting_after(inputs[-1]):
            same = module.graph.call_function(_SAME[leaf is None], (node, leaf))
        with module.graph.inserting_after(same):
            module.graph.call_function(torch._assert, (same, said))
    module.recompile()


def held_inputs(module: GraphModule) -> frozenset[int]:
    """Positions of the inputs that a captured graph asserts to be what they were."""
    inputs = module.graph.find_nodes(op="placeholder")
    held = {node.target for node in module.graph.find_nodes(op="get_attr")}
    return frozenset(k for k, node in enumerate(inputs) if f"{HELD}{node.name}" in held)
