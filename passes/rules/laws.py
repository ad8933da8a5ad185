"""laws: the axis rule of an op, found by experiment.

Every axis has a size of its own in the sample, so that sizes name the axes. For each axis the op is
run on random tensors with an index set K kept (S_K) and compared with the laws of passes/rules:

    carry   op(S_K x) = S_K op(x)
    sum     op(S_K x, S_K w) = op(1_K x, w)      1_K zeroes what S_K removes, in one operand
    mean    S_K op(1_K x, w) = c op(S_K x, S_K w)      c != 1 is the same for all numbers
    mixed   the op runs on S_K x, but no law holds
    fixed   the op does not even run on S_K x

An experiment is no proof: it is repeated on fresh numbers and index sets, and the compact graph is
verified against the masked one all the same.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import FaspGraphError

Op = Callable[..., Any]
TRIALS = 3


def probe(op: Op, sample: Sequence[Any]) -> str:
    """The rule of `op`, e.g. "a b, c b -> a c". `sample`: its arguments; tensors of the same axis
    have the same size there, other axes have other sizes, and every size is at least 3.

    `rules.register("namespace.name", rule)` makes the analysis use it. An axis under a mean is
    called mixed, since no experiment tells how the op counts. FaspGraphError where the sample
    cannot tell axes apart.
    """
    sample = [t.double() if _real(t) else t for t in sample]
    tensors = [t for t in sample if isinstance(t, Tensor)]
    outputs = _tensors(op(*sample))
    sizes = list(dict.fromkeys(n for t in [*tensors, *outputs] for n in t.shape))
    held = [*tensors, *outputs]
    if any(n < 3 for n in sizes) or any(len(set(t.shape)) < t.dim() for t in held):
        shapes = [[tuple(t.shape) for t in side] for side in (tensors, outputs)]
        raise FaspGraphError(
            f"the sample's shapes {shapes[0]}, of which the op makes {shapes[1]}, do not name the "
            "axes · help: give every axis a size of its own, at least 3, the same wherever the "
            "axis occurs; sizes that the op makes (a half, say) must be others as well"
        )
    names = {n: string.ascii_lowercase[k] for k, n in enumerate(sizes)}
    operands = [tuple(names[n] for n in t.shape) for t in tensors]
    results = [tuple(names[n] for n in t.shape) for t in outputs]
    marks = ""
    for axis in dict.fromkeys(name for names in operands for name in names):
        kind = observed(op, sample, operands, results, axis)
        carried = any(axis in names for names in results)
        if kind != ("carry" if carried else "sum"):
            marks += f"; {'mixed' if kind == 'mean' else kind} {axis}"
    sides = [", ".join(" ".join(side) for side in group) for group in (operands, results)]
    return " -> ".join(sides) + marks


def observed(
    op: Op,
    sample: Sequence[Any],
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    axis: str,
    trials: int = TRIALS,
) -> str:
    """The kind of one axis: carry, sum, mean, mixed or fixed. Axis names are given per tensor
    argument and per result.
    """
    kinds = {_observe(op, sample, operands, results, axis, seed) for seed in range(trials)}
    return next(kind for kind in ("fixed", "mixed", "mean", "sum", "carry") if kind in kinds)


def _observe(
    op: Op,
    sample: Sequence[Any],
    operands: Sequence[Sequence[str]],
    results: Sequence[Sequence[str]],
    axis: str,
    seed: int,
) -> str:
    generator = torch.Generator().manual_seed(seed)
    fresh = [
        torch.randn(a.shape, generator=generator, dtype=a.dtype) if _real(a) else a for a in sample
    ]
    size = _size(fresh, operands, axis)
    kept = torch.randperm(size, generator=generator)[: max(1, size // 2)].sort().values
    try:
        small = _tensors(op(*_each(fresh, operands, axis, lambda t, d: t.index_select(d, kept))))
    except (RuntimeError, IndexError, ValueError):
        return "fixed"
    carried = any(axis in names for names in results)
    if carried and _same(small, _short(_tensors(op(*fresh)), results, axis, kept)):
        return "carry"
    zeroed = _tensors(op(*_zero_one(fresh, operands, axis, kept)))
    expected = _short(zeroed, results, axis, kept)
    if not carried and _same(small, expected):
        return "sum"
    return "mean" if _proportional(small, expected) else "mixed"


def _short(
    outputs: list[Tensor], results: Sequence[Sequence[str]], axis: str, kept: Tensor
) -> list[Tensor]:
    """The outputs without what S_K removes."""
    return [
        t.index_select(list(names).index(axis), kept) if axis in names else t
        for t, names in zip(outputs, results, strict=False)
    ]


def _each(
    sample: Sequence[Any],
    operands: Sequence[Sequence[str]],
    axis: str,
    change: Callable[[Tensor, int], Tensor],
) -> list[Any]:
    """The sample with every tensor that has the axis changed."""
    names = iter(operands)
    result = []
    for item in sample:
        held = next(names, ()) if isinstance(item, Tensor) else ()
        result.append(change(item, list(held).index(axis)) if axis in held else item)
    return result


def _zero_one(
    sample: Sequence[Any], operands: Sequence[Sequence[str]], axis: str, kept: Tensor
) -> list[Any]:
    """1_K on the first floating-point tensor that has the axis."""
    done = False

    def zero(tensor: Tensor, dim: int) -> Tensor:
        nonlocal done
        if done or not tensor.is_floating_point():
            return tensor
        done = True
        mask = torch.zeros(tensor.shape[dim], dtype=tensor.dtype).index_fill(0, kept, 1)
        return tensor * mask.view([-1 if d == dim else 1 for d in range(tensor.dim())])

    return _each(sample, operands, axis, zero)


def _size(sample: Sequence[Any], operands: Sequence[Sequence[str]], axis: str) -> int:
    tensors = [t for t in sample if isinstance(t, Tensor)]
    return next(
        int(t.shape[list(names).index(axis)])
        for t, names in zip(tensors, operands, strict=False)
        if axis in names
    )


def _real(item: Any) -> bool:
    return isinstance(item, Tensor) and item.is_floating_point()


def _tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def _proportional(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether one positive number, not 1, turns the right outputs into the left ones."""
    scales = [float(a.norm() / b.norm()) for a, b in zip(left, right, strict=True) if b.any()]
    differ = bool(scales) and abs(scales[0] - 1) > 1e-6
    return differ and _same(left, [b * scales[0] for b in right])


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)
        for a, b in zip(left, right, strict=True)
    )
