"""An axis rule (passes/rules) applied to one call: carried axes unite, summed axes unite and end in
a Site, mixed and fixed axes are marked; an axis under a mean is both.

While they meet, the arrays of all operands are laid out over all axes of the rule, in one order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import Node

from .errors import FaspGraphError, where
from .rules import CUSTOM, Axes, Call, Rule, parse
from .values import Arrays, Labels, Operand, Site, Value, varying
from .visit import Visit, tensor_arguments


def apply_rule(visit: Visit, rule: Rule) -> list[Arrays]:
    """Labels of the results, by a rule for the tensor arguments in their order."""
    shaped = {k: _shaped(v) for k, v in visit.given.items()}
    axes = parse(rule if isinstance(rule, str) else rule(Call(shaped)))
    operands: list[Any] = []
    for name in tensor_arguments(visit.node):
        held = visit.bound[name]
        operands += list(held) if isinstance(held, (list, tuple)) else [held]
    if visit.name in CUSTOM:
        given = [visit.labels.values[n] if isinstance(n, Node) else None for n in operands]
        _refuse_misfit(visit, zip(axes.operands, given, strict=False))
        _refuse_misfit(visit, zip(axes.outputs, visit.outs, strict=False))
    return apply(visit, axes, operands[: len(axes.operands)])


def _refuse_misfit(visit: Visit, sides: Iterable[tuple[tuple[str, ...], Any]]) -> None:
    """FaspGraphError where a registered rule names more or fewer axes than a tensor has dims."""
    for names, held in sides:
        if not isinstance(held, (Value, Tensor)):
            continue
        rank, free = len(held.shape), "..." in names
        if len(names) - free > rank or (len(names) < rank and not free):
            raise FaspGraphError(
                f"the rule that was registered for {visit.name} names the axes "
                f"{' '.join(names)!r} of a tensor of shape {list(held.shape)} · "
                f"{where(visit.node)} · help: one name for each dim, `...` for leading ones"
            )


def _shaped(item: Any) -> Any:
    if isinstance(item, (list, tuple)) and any(isinstance(v, Value) for v in item):
        return [_shaped(v) for v in item]
    return item.shape if isinstance(item, Value) else item


def apply(visit: Visit, axes: Axes, operands: list[Any]) -> list[Arrays]:
    """Carried axes unite, summed axes unite and make a Site, the others are marked."""
    labels = visit.labels
    values = [labels.values[n] if isinstance(n, Node) else None for n in operands]
    values = _repeat_grouped(visit, values)
    lists = [
        _expand(names, len(v.shape)) if v is not None else ()
        for names, v in zip(axes.operands, values, strict=False)
    ]
    order = list(dict.fromkeys(name for names in lists for name in names))
    outputs = [_expand_out(names, order) for names in axes.outputs]
    outputs += outputs[-1:] * (len(visit.outs) - len(outputs))
    carried = {name for names in outputs for name in names}
    _note_inside(visit, values, lists, carried)
    merged: dict[str, Tensor] = {}
    for axis in order:
        sides = []
        for n, v, names in zip(operands, values, lists, strict=False):
            if v is None or axis not in names:
                continue
            dim = names.index(axis)
            if dim in v.arrays:
                sides.append(Operand(n, dim, _canonical(v.arrays[dim], names, order), not v.weight))
        if not sides:
            continue
        merged[axis] = labels.meet([side.labels for side in sides])
        kind = _kind(visit, axes.kind(axis, axis in carried), merged[axis])
        if kind in ("sum", "mean") and not labels.is_fixed(merged[axis]):
            labels.sites.append(Site(visit.node, tuple(sides), kind == "mean"))
        if kind in ("mean", "mixed"):
            reason = visit.reason(f"mixed by {visit.name}")
            labels.mark(kind, [merged[axis]], reason, visit.node)
        elif kind == "fixed":
            reason = visit.reason(f"fixed by {visit.name}")
            labels.mark("frozen", [merged[axis]], reason, visit.node)
        if axis in carried and visit.name in ("batch_norm", "instance_norm", "prelu", "rms_norm"):
            labels.mark("bent", [merged[axis]], "a scale per channel")
    return [
        _result(visit, merged, order, names, out)
        for names, out in zip(outputs, visit.outs, strict=False)
    ]


def _kind(visit: Visit, kind: str, array: Tensor) -> str:
    """Channels that are normalised in groups: each must keep as many, or go as a whole (in the run
    on blocks), which mixes nothing.
    """
    groups = visit.given.get("num_groups") or 1
    if kind != "mixed" or not 1 < groups < array.numel() or array.numel() != visit.shape[1]:
        return kind
    parts = array.reshape(groups, -1)
    if visit.outer:
        visit.labels.unite(parts[:, :1], parts)
        return "carry"
    visit.labels.parts.append(parts)
    return kind


def _note_inside(
    visit: Visit, values: list[Any], lists: list[tuple[str, ...]], carried: set[str]
) -> None:
    """Labels of a batch axis (carried, on every operand of an axis that is not) that vary along an
    axis that is none.
    """
    held = [set(names) for names in lists]
    batch: set[str] = set()
    for axis in set().union(*held) - carried:
        operands = [names for names in held if axis in names]
        batch |= set.intersection(*operands) & carried if len(operands) > 1 else set()
    for value, names in zip(values, lists, strict=False):
        for dim, array in value.arrays.items() if value is not None and batch else ():
            if names[dim] in batch and any(names[d] not in batch for d in varying(array)):
                visit.labels.inside.append(array)


def _repeat_grouped(visit: Visit, values: list[Any]) -> list[Any]:
    """Attention with enable_gqa: query head h reads KV head h // (heads / KV heads)."""
    if not visit.given.get("enable_gqa"):
        return values
    heads = values[0].shape[-3]
    result = list(values)
    for k in (1, 2):
        value = values[k]
        dim = len(value.shape) - 3
        times = heads // value.shape[dim]
        arrays = {
            d: a.repeat_interleave(times, dim) if a.shape[dim] > 1 else a
            for d, a in value.arrays.items()
        }
        result[k] = Value(value.fake, arrays, value.const)
    return result


def _result(
    visit: Visit, merged: dict[str, Tensor], order: list[str], names: tuple[str, ...], out: Any
) -> Arrays:
    if not isinstance(out, Tensor):
        return {}
    found: Arrays = {}
    for dim, size in enumerate(out.shape):
        axis = names[dim] if dim < len(names) else ""
        if size == 1:
            continue
        if axis in merged:
            found[dim] = _restrict(visit.labels, merged[axis], order, names)
        else:
            reason = visit.reason(f"a position of {visit.name}")
            found[dim] = visit.labels.fixed(reason, out.dim())
    return found


def _expand(names: tuple[str, ...], rank: int) -> tuple[str, ...]:
    if "..." not in names:
        return names
    at = names.index("...")
    free = rank - len(names) + 1
    return (*names[:at], *(f".{free - k}" for k in range(free)), *names[at + 1 :])


def _expand_out(names: tuple[str, ...], order: list[str]) -> tuple[str, ...]:
    if "..." not in names:
        return names
    at = names.index("...")
    dots = sorted((name for name in order if name[0] == "."), key=lambda n: -int(n[1:]))
    return (*names[:at], *dots, *names[at + 1 :])


def _canonical(array: Tensor, names: tuple[str, ...], order: list[str]) -> Tensor:
    present = [name for name in order if name in names]
    array = array.permute([names.index(name) for name in present])
    index = tuple(slice(None) if name in names else None for name in order)
    return array[index]


def _restrict(labels: Labels, array: Tensor, order: list[str], names: tuple[str, ...]) -> Tensor:
    for dim, name in enumerate(order):
        if name not in names:
            array = labels.collapse(array, dim)
    present = [name for name in names if name in order]
    array = array.permute(
        [order.index(n) for n in present] + [k for k, n in enumerate(order) if n not in names]
    )
    array = array.reshape(array.shape[: len(present)])
    return array[tuple(slice(None) if name in order else None for name in names)]
