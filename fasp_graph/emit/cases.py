"""cases: inputs at which a module must have the compact graph's numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args, tensors
from passes.verify import fresh_inputs

Case = tuple[Args, list[Tensor]]


def cases(compact: GraphModule, inputs: Args) -> list[Case]:
    """Inputs with the compact graph's outputs: the sample, fresh numbers, other sizes."""
    doubled = pytree.tree_map(lambda v: torch.cat([v, v]) if _batched(v) else v, inputs)
    lengths = {v.shape[1] for v in pytree.tree_leaves(inputs) if _sequence(v)}
    short = max(lengths, default=3) * 2 // 3
    shorter = pytree.tree_map(
        lambda v: v[:, :short].contiguous() if _sequence(v) and short > 1 else v, doubled
    )
    found: list[Case] = []
    for args in (inputs, fresh_inputs(inputs, 1, False), doubled, shorter):
        with torch.no_grad():
            try:
                found.append((args, tensors(compact(*args[0], **args[1]))))
            except (RuntimeError, IndexError, ValueError):
                if not found:
                    raise
    return found


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 1


def _sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def same(module: nn.Module, args: Args, expected: list[Tensor]) -> bool:
    """Whether the module's outputs are the expected ones but for rounding."""
    with torch.no_grad():
        actual = tensors(module(*args[0], **args[1]))[: len(expected)]
    return len(actual) == len(expected) and all(
        a.shape == e.shape and torch.allclose(a.double(), e.double(), 0, _tolerance(e), True)
        for a, e in zip(actual, expected, strict=True)
    )


def _tolerance(tensor: Tensor) -> float:
    """Rounding of another order of sums, relative to the largest element."""
    if not tensor.numel():
        return 1.0
    unit = 1e-5 if tensor.dtype in (torch.float32, torch.float64) else 3e-2
    return unit * max(1e-3, float(tensor.abs().max()))
