"""compare: a captured graph against the model that it was captured from.

What a model returns is made plain first: dataclasses are dicts, complex numbers their two parts.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.random import fork_rng
from torch.utils import _pytree as pytree

from .bounds import BOUND, assert_axes
from .branches import ASSUMED
from .errors import CaptureError
from .free_axes import Args, enlarged, resized, static_axes
from .lazy import is_lazy
from .precision import is_half, widened, widened_inputs
from .skeleton import shared_copy
from .state import steady
from .tracing import silenced
from .visit import op_name

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest output
HALF = 2e-2
SIZES = (lambda n: n // 2, lambda n: 1, lambda n: n + 1, lambda n: 2 * n - 1)
"""What a static axis of n is tried at; the first alone where there are several inputs, which must
fit each other, or a kernel that reads on past what does not fit.
"""
UNCHECKED = {"_weight_norm"}
"""Kernels of torch that do not check that sizes fit."""


def compare(
    module: GraphModule,
    model: nn.Module,
    args: Args,
    free: dict[int, list[int]],
    runs: list[Args],
) -> None:
    """Equal numbers at the sample size and, where axes stayed dynamic, at twice that size; and in
    other `runs`, but those which the model or an assertion of the graph refuses. Where a size of
    one, or half of a static size, gives other numbers, the graph asserts that it is not so.
    """
    reference = shared_copy(model).eval()
    if not _same(module, reference, args):
        raise _different("at 1 times the sample size")
    if not is_lazy(model) and not _same(module, reference, args, calls=2):
        raise _different("when it is called again")
    if not is_lazy(model):  # every run would read all weights
        _bound(module, reference, args, free)
    for sizes, where in (
        *([(enlarged(args, 2, free), "at 2 times the sample size")] if free else []),
        *((run, "where it branches on numbers") for run in runs),
    ):
        with contextlib.suppress(_Refused):
            if not _same(module, reference, sizes, refusing=True):
                raise _different(where)


def _bound(module: GraphModule, model: nn.Module, args: Args, free: dict[int, list[int]]) -> None:
    """Let the graph assert that a free axis is not one, or that a static one is as it is, unless it
    equals the model at these sizes too, where the model takes them.
    """
    for axes in _by_axis(free):
        if not _holds(module, model, resized(args, axes, lambda n: 1)):
            assert_axes(module, args, axes, more_than_one=True)
    unsafe = any(op_name(node) in UNCHECKED for node in module.graph.nodes)
    sizes = SIZES[:1] if unsafe or len(tensors(args)) > 1 else SIZES
    for axes in _by_axis(static_axes(args, free)):
        if not all(_holds(module, model, resized(args, axes, size)) for size in sizes):
            assert_axes(module, args, axes, more_than_one=False)


def _holds(module: GraphModule, model: nn.Module, args: Args) -> bool:
    with silenced():
        try:
            outputs(without_cache(model, args), args)
        except Exception:  # its own code may refuse a size in any way
            return True
        try:
            return _same(module, model, args)
        except Exception as error:
            return BOUND in str(error)


def _by_axis(axes: dict[int, list[int]]) -> list[dict[int, list[int]]]:
    """The same axis of all inputs, one after the other; then those behind the second together."""
    every = sorted({axis for dims in axes.values() for axis in dims})
    found = [{at: [axis] for at, dims in axes.items() if axis in dims} for axis in every]
    space = {at: [axis for axis in dims if axis > 1] for at, dims in axes.items()}
    return [*found, space] if sum(axis > 1 for axis in every) > 1 else found


def _different(where: str) -> CaptureError:
    return CaptureError(
        f"the captured graph computes other numbers than the model, {where} · help: take out what "
        "forward draws at random or remembers from call to call, or report it with the model"
    )


class _Refused(Exception):
    """A size or numbers that the model itself refuses (a table of positions ends, say)."""


def _same(
    module: GraphModule, model: nn.Module, args: Args, refusing: bool = False, calls: int = 1
) -> bool:
    given = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args)
    try:
        expected = outputs(without_cache(model, args), args, calls)
    except Exception as error:
        if refusing:
            raise _Refused from error
        raise
    if not all(map(_equal, tensors(given), tensors(args))):
        raise CaptureError(
            "the model writes into its inputs, which a graph does not repeat · help: clone "
            "them at the start of forward"
        )
    try:
        found = outputs(module, args, calls)
    except RuntimeError as error:
        if refusing and any(said in str(error) for said in (ASSUMED, BOUND)):
            raise _Refused from error
        raise
    return _all_equal(expected, found) or _equal_when_wide(module, model, args)


def _equal_when_wide(module: GraphModule, model: nn.Module, args: Args) -> bool:
    """Whether the difference was rounding of half precision: in float32 there is none."""
    if not is_half(model):
        return False
    wide, given = widened(model), widened_inputs(args)
    try:
        expected = outputs(without_cache(wide, given), given)
    except Exception:  # code that insists on a precision
        return False
    return _all_equal(expected, outputs(widened(module), given))


def _all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def outputs(call: Callable[..., Any], args: Args, calls: int = 1) -> list[Tensor]:
    """All tensors that a call gives, without gradients; what it draws at random is always alike,
    and what it remembers is forgotten; of several calls the last one's.
    """
    owner: Any = call
    while isinstance(owner, functools.partial):
        owner = owner.func
    with steady(getattr(owner, "__self__", owner)), torch.no_grad(), fork_rng(devices=[]):
        _seed()
        for _ in range(calls - 1):
            call(*args[0], **args[1])
        return tensors(call(*args[0], **args[1]))


def _seed() -> None:
    """Where there is no accelerator, torch.manual_seed formats the stack for each that could be."""
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    tolerance = TOLERANCE.get(left.dtype, HALF)
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())  # infinities as well
    scale = max(1.0, float(left[left.isfinite()].abs().max())) if left.isfinite().any() else 1.0
    return bool((same | ((left - right).abs() <= tolerance * scale)).all())


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order; complex numbers as their two parts."""
    found = [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]


def without_cache(forward: Callable[..., Any], args: Args) -> Callable[..., Any]:
    """`forward` with use_cache=False, where it has the option and the caller left it open."""
    signature = inspect.signature(getattr(forward, "forward", forward))
    names = list(signature.parameters)
    if "use_cache" not in names or "use_cache" in args[1]:
        return forward
    if names.index("use_cache") < len(args[0]):
        return forward
    return functools.partial(forward, use_cache=False)


def plain(output: Any) -> Any:
    """Outputs that torch.export cannot return (dataclasses, objects) as dicts and tensors."""
    if isinstance(output, Tensor) or output is None:
        return output
    if type(output) in pytree.SUPPORTED_NODES:
        leaves, spec = pytree.tree_flatten(
            output,
            is_leaf=lambda item: item is not output and type(item) not in pytree.SUPPORTED_NODES,
        )
        return pytree.tree_unflatten([plain(leaf) for leaf in leaves], spec)
    if is_dataclass(output) and not isinstance(output, type):
        return {f.name: plain(getattr(output, f.name)) for f in fields(output)}
    return output if isinstance(output, (int, float, bool, str)) else None
