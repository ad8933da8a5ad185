"""cases: inputs at which a module must have the compact graph's numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args
from passes.compare import outputs
from passes.errors import UnsupportedOp, brief
from passes.fresh import doubled, fresh_inputs
from passes.held import held_inputs
from passes.precision import widened, widened_inputs

Case = tuple[Args, list[Tensor]]


def cases(compact: GraphModule, inputs: Args) -> list[Case]:
    """Inputs with the compact graph's outputs: the sample, fresh numbers, other sizes."""
    double = doubled(inputs)
    lengths = {v.shape[1] for v in pytree.tree_leaves(inputs) if _sequence(v)}
    short = max(lengths, default=3) * 2 // 3
    shorter = pytree.tree_map(
        lambda v: v[:, :short].contiguous() if _sequence(v) and short > 1 else v, double
    )
    found: list[Case] = []
    fresh = fresh_inputs(inputs, 1, False, held=held_inputs(compact))
    for args in (inputs, fresh, double, shorter):
        try:
            expected = outputs(compact, args)
            undefined = any(t.numel() and bool(t.isnan().all()) for t in expected)
            if not found or not undefined:
                found.append((args, expected))
        except (RuntimeError, IndexError, ValueError) as error:
            if not found:
                raise UnsupportedOp(
                    f"the compact graph does not run at its sizes: {brief(error, 200)} · nothing "
                    "was written · help: align=8 asks for sizes that kernels take"
                ) from error
    return found


def _sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def same(module: nn.Module, args: Args, expected: list[Tensor]) -> bool:
    """Whether the module's outputs are the expected ones but for rounding."""
    return apart(module, args, expected) <= 1


def same_when_wide(module: nn.Module, compact: GraphModule, args: Args) -> bool:
    """Whether, in float32, the module's outputs are the compact graph's."""
    given, wide = widened_inputs(args), widened(compact)
    expected = outputs(wide, given)
    return same(widened(module), given, expected)


def apart(module: nn.Module, args: Args, expected: list[Tensor]) -> float:
    """The largest difference from the expected outputs, in units of what rounding explains."""
    actual = outputs(module, args)[: len(expected)]
    if [a.shape for a in actual] != [e.shape for e in expected]:
        return math.inf
    return max((_apart(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)


def _apart(actual: Tensor, expected: Tensor) -> float:
    """Places that are equal (infinities) or both NaN do not count; one NaN is infinitely far."""
    a, e = actual.double(), expected.double()
    gap = (a - e).abs()[~((a == e) | (a.isnan() & e.isnan()))]
    if not len(gap):
        return 0.0
    largest = e[e.isfinite()].abs().max() if e.isfinite().any() else e.new_zeros(())
    unit = 1e-5 if expected.dtype in (torch.float32, torch.float64) else 3e-2
    return float((gap / (unit * largest.clamp_min(1e-3))).nan_to_num(math.inf).max())
