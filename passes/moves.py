"""Ops that move data: the very same op is executed on the label arrays.

Where a dim is split (view, unflatten), its labels vary along several dims of the result. The home
is then the innermost of them and the outer ones enumerate blocks; in the run on blocks it is the
next one out, and what is inside a block is united.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .values import BLOCKS, Arrays, Value, along, compress, varying
from .visit import Visit

MOVEMENT = {
    *("reshape", "view", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"),
    *("permute", "transpose", "t", "movedim", "swapaxes", "squeeze", "unsqueeze", "numpy_T"),
    *("expand", "expand_as", "select", "slice", "narrow", "split", "split_with_sizes", "chunk"),
    *("unbind", "roll", "flip", "repeat", "tile", "repeat_interleave", "index_select", "index"),
    *("pixel_shuffle", "pixel_unshuffle", "unfold", "diagonal", "tensor_split"),
    *(
        "broadcast_to",
        "adjoint",
        "mT",
        "mH",
        "matrix_H",
        "as_strided",
        "rot90",
        "unsafe_split",
        "unsafe_chunk",
    ),
}
SELECTION = {"clone", "contiguous", "to", "_to_copy", "detach", "alias"}
LIKE = {"view_as", "reshape_as", "expand_as"}
SAME_DIMS = {"slice", "narrow", "split", "split_with_sizes", "chunk", "flip", "tensor_split"}
CHANNEL_HOME = {"pixel_shuffle": -3, "pixel_unshuffle": -3}
UNMOVABLE = {"roll", "unfold", "diagonal"}  # places depend on the size
ALONG = {"repeat_interleave", "index_select", "roll", "flip"}  # their dims lose or change places
RESHAPES = {"reshape", "view", "_unsafe_view", "flatten", "reshape_as", "view_as"}
GROWING = {"expand", "expand_as", "broadcast_to", "repeat", "tile", "repeat_interleave"}


@dataclass
class _Slot:
    """What one result collects: per dim the arrays that want it, and the fixed ones."""

    free: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    fixed: dict[int, Tensor] = field(default_factory=dict)


def move(visit: Visit) -> list[Arrays]:
    """Labels of the results of a movement op."""
    value = next(visit.values())
    execute = _executor(visit, value)
    slots = [_Slot() for _ in visit.outs]
    for dim, array in value.arrays.items():
        ticks = execute(_ticks(value, dim))
        if visit.name in RESHAPES:
            array = _unite_inside(visit, value, dim, array, execute, ticks[0])
        moved = execute(array)
        for slot, out, tick in zip(slots, moved, ticks, strict=True):
            if out.numel():
                _place(visit, slot, dim, array, compress(out), varying(compress(tick)))
    arrays = [_settle(visit, slot, out) for slot, out in zip(slots, visit.outs, strict=True)]
    if visit.name in LIKE:
        other = list(visit.values())[1].arrays
        arrays = [{d: visit.labels.meet([a, other[d]]) for d, a in arrays[0].items()}]
    return arrays


def _ticks(value: Value, dim: int) -> Tensor:
    """The positions along a dim, as an array."""
    return along(torch.arange(value.shape[dim]), dim, len(value.shape))


def _unite_inside(
    visit: Visit,
    value: Value,
    dim: int,
    array: Tensor,
    execute: Callable[[Tensor], list[Tensor]],
    ticks: Tensor,
) -> Tensor:
    """A dim that is merged with dims inside it must lose the same places at each of theirs: the
    order of what stays would depend on them otherwise (a channel shuffle).
    """
    for inner in varying(array):
        if inner > dim:
            moved = set(varying(compress(execute(_ticks(value, inner))[0])))
            if moved & set(varying(compress(ticks))):
                array = visit.labels.collapse(array, inner)
    return array


def _executor(visit: Visit, value: Value) -> Callable[[Tensor], list[Tensor]]:
    """The op as a function of an array that broadcasts to the value's shape."""
    if visit.name in RESHAPES:
        return lambda array: [_reshaped(array, value.shape, tuple(visit.outs[0].shape))]

    def plain(item: Any) -> Any:
        if not isinstance(item, Value):
            return item
        return item.const if item.const is not None else torch.empty(()).expand(item.shape)

    given = pytree.tree_map(plain, dict(visit.given), is_leaf=lambda v: isinstance(v, Value))
    first = next(name for name, item in visit.given.items() if item is value)
    rank = len(value.shape)
    along_dims = visit.name in ALONG and visit.outs[0].dim() == rank

    def execute(array: Tensor) -> list[Tensor]:
        if along_dims and not set(varying(array)).intersection(_dims(visit, rank)):
            return [array]
        arguments = {**given, first: array.expand(value.shape)}
        result = visit.node.target(**arguments)  # type: ignore[operator]
        return [result] if isinstance(result, Tensor) else list(result)

    return execute


def _reshaped(array: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """A reshape; leading dims that stay, and along which the array does not change, stay 1."""
    still = 0
    for before, after, held in zip(old, new, array.shape, strict=False):
        if not before == after > 0 or held > 1:
            break
        still += 1
    whole = array.expand([*array.shape[:still], *old[still:]])
    return whole.reshape([*array.shape[:still], *new[still:]])


def _place(
    visit: Visit, slot: _Slot, dim: int, array: Tensor, out: Tensor, spread: list[int]
) -> None:
    """Give one moved array its home among the dims `spread` along which its positions vary."""
    labels = visit.labels
    if labels.is_fixed(array):
        for d in spread:
            slot.fixed.setdefault(d, array.reshape([1] * out.dim()))
        return
    if visit.name in UNMOVABLE and _disturbed(visit, dim, array.dim()):
        visit.freeze([array], f"moved by {visit.name}")
        return
    if visit.name in CHANNEL_HOME:
        home = CHANNEL_HOME[visit.name] % out.dim()
        for d in spread:
            out = labels.collapse(out, d) if d != home else out
    homes = [d for d in spread if out.shape[d] > 1]
    if not homes:
        _stand_still(visit, slot, dim, out, spread)
        return
    if visit.outer and len(homes) > 1:
        inner = homes.pop()
        labels.mark("blocked", [out], "a block", visit.node)
        out = labels.collapse(out, inner)
    slot.free.setdefault(homes[-1], []).append((dim, out))


def _stand_still(visit: Visit, slot: _Slot, dim: int, out: Tensor, spread: list[int]) -> None:
    """One position was selected (it cannot go), or all positions are one label."""
    blocks = [d for d in varying(out) if visit.outer or visit.labels.is_block(slot.fixed.get(d))]
    if spread or blocks:
        for d in spread or blocks[-1:]:
            slot.free.setdefault(d, []).append((dim, out))
    else:
        visit.freeze([out], f"selected by {visit.name}")


def _disturbed(visit: Visit, dim: int, rank: int) -> bool:
    """Whether an op whose effect depends on sizes acts on this very dim; a roll of it is made one
    by an index (passes/edits.py).
    """
    if visit.name == "roll" and visit.given["dims"]:
        return False
    return dim in _dims(visit, rank)


def _dims(visit: Visit, rank: int) -> list[int]:
    """The dims that an op names; all if it names none."""
    given = visit.given.get("dims") or [
        visit.given[k]
        for k in ("dim", "dimension", "dim1", "dim2")
        if visit.given.get(k) is not None
    ]
    return [d % rank for d in given] or list(range(rank))


def _settle(visit: Visit, slot: _Slot, out: Tensor) -> Arrays:
    """One array per dim of size > 1."""
    result: Arrays = {}
    for dim, size in enumerate(out.shape):
        if size == 1:
            continue
        if dim in slot.free:
            result[dim] = _merge(visit, slot.free[dim])
        elif dim in slot.fixed:
            result[dim] = slot.fixed[dim]
        elif visit.name in GROWING and not any(a.shape[dim] > 1 for a in _arrays(slot)):
            fresh = visit.labels.fresh("free", visit.node.name, dim, size)
            result[dim] = along(fresh, dim, out.dim())
        else:
            result[dim] = visit.labels.fixed(visit.reason(BLOCKS), out.dim())
    return result


def _arrays(slot: _Slot) -> list[Tensor]:
    return [array for arrays in slot.free.values() for _, array in arrays]


def _merge(visit: Visit, candidates: list[tuple[int, Tensor]]) -> Tensor:
    """Several arrays want one dim (a flatten): the finest that weights own covers it; in the run
    on blocks the outermost.
    """
    labels = visit.labels

    def fitness(candidate: tuple[int, Tensor]) -> tuple[int, ...]:
        dim, array = candidate
        owned = labels.kind(array) == "parameter"
        finest = (len(torch.unique(array)), array.numel())
        return (owned, -dim, *finest) if visit.outer else (owned, *finest)

    *others, (_, best) = sorted(candidates, key=fitness)
    for _, other in others:
        same = other.shape == best.shape and labels.kind(other) == labels.kind(best)
        if same and len(torch.unique(other)) == len(torch.unique(best)):
            labels.unite(best, other)
        else:
            visit.freeze([other], f"an axis that {visit.name} merges with another")
    return best
