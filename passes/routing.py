"""Choosing positions by data, and looking them up.

    v, j = topk(x, k)      j points at positions of x's axis: the labels there are its domain
    w[j], gather(s, j)     an index with a domain meets an axis: domain and axis unite

Removing a position then renumbers both: the axis (experts, say) can shrink. The law is that of a
choice that never falls on what is removed: topk(S_K x) = topk(x with -inf outside K). An index
without a domain (token ids) fixes the axis that it points at.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor

from . import indexing, moves
from .axes import apply_rule
from .choices import CHOICES, taken
from .rules import table
from .values import Arrays, Mark, Value, along
from .visit import Visit

PASSING = moves.MOVEMENT | moves.SELECTION | {"clamp", "clamp_min", "clamp_max", "gather", "cat"}
COMPARED = {"eq", "ne", "lt", "le", "gt", "ge"}


def domains(visit: Visit) -> list[Tensor | None]:
    """The labels that the integers of each result point at; None where they point at no axis."""
    nothing: list[Tensor | None] = [None] * len(visit.outs)
    name = visit.name.rstrip("_")
    slot = CHOICES.get(name)
    if slot is not None and len(visit.outs) > slot:
        value = next(visit.values())
        axis = _axis(visit, value)
        chosen = axis is not None and _whole(visit.outs[slot])
        return [axis if chosen and k == slot else None for k in range(len(visit.outs))]
    values = list(visit.values())
    if name not in PASSING and name not in ("index", "index_select"):
        return nothing
    values = values if name == "cat" else values[:1]  # of a lookup, what is looked up
    held = [value.domain for value in values if value.domain is not None]
    if not held or not _whole(visit.outs[0]):
        return nothing
    for other in held[1:]:
        if len(other) == len(held[0]):
            visit.labels.unite(held[0], other)
    if name == "cat":
        _chosen_together(visit, values, held[0])
    return [held[0]] * len(visit.outs)


def _chosen_together(visit: Visit, values: list[Value], axis: Tensor) -> None:
    """Choices of one position each, side by side: as many must stay as there are choices, for the
    second may be made among what the first has left.
    """
    dim = visit.dim("dim", visit.outs[0].dim(), 0)
    if all(value.shape[dim] == 1 for value in values):
        reason = visit.reason("chosen together")
        row, least = axis.reshape(1, -1), visit.outs[0].shape[dim]
        visit.labels.marks.append(Mark("routed", row, reason, least=least))


def settle(visit: Visit) -> None:
    """What is done to an index but looking it up or moving it gives its numbers a meaning of their
    own: its domain is fixed.
    """
    name = visit.name.rstrip("_")
    values = list(visit.values())
    for value in values:
        if value.domain is None or _keeps(visit, name, value, values):
            continue
        visit.freeze([value.domain], f"an index into the axis is used as a number by {name}")


def _keeps(visit: Visit, name: str, value: Value, values: list[Value]) -> bool:
    """Whether an index stays one: looked up, compared with no position, moved as it is."""
    several = visit.given.get("indices")
    picks = (visit.given.get("index"), *(several if isinstance(several, list) else [several]))
    if name in LOOKUPS and (any(value is pick for pick in picks) or name == "one_hot"):
        return True  # the handlers fix what does not meet its axis
    if name in COMPARED:
        return _beyond(visit, len(value.domain))  # type: ignore[arg-type]
    if name not in PASSING and name not in ("index", "index_select"):
        return False
    if name == "cat":
        return all(other.domain is not None for other in values)
    low, high = visit.given.get("min"), visit.given.get("max")
    inside = (low is None or _at_most(low, 0)) and (
        high is None or _at_most(len(value.domain) - 1, high)  # type: ignore[arg-type]
    )
    return inside and all(_whole(out) for out in visit.outs)


def _at_most(left: object, right: object) -> bool:
    return isinstance(left, (int, float)) and isinstance(right, (int, float)) and left <= right


def _whole(out: Tensor) -> bool:
    """Whether numbers of this type can point at places."""
    return not (out.is_floating_point() or out.is_complex() or out.dtype == torch.bool)


def _beyond(visit: Visit, size: int) -> bool:
    """A comparison with the number of positions: no index reaches it, before or after."""
    other = visit.given.get("other")
    return isinstance(other, int) and other >= size


def _axis(visit: Visit, value: Value) -> Tensor | None:
    """The labels of the axis that a choice is made on, if it can shrink."""
    rank = len(value.shape)
    if visit.given.get("dim", -1) is None or not rank:
        return None
    array = value.arrays.get(visit.dim("dim", rank, -1))
    if array is None or visit.labels.is_fixed(array):
        return None
    return array.reshape(-1) if array.numel() == array.shape[visit.dim("dim", rank, -1)] else None


def choose(visit: Visit) -> list[Arrays]:
    """topk, sort, argmax, argmin: the chosen places are fixed, the other dims carried."""
    value = next(visit.values())
    rank = len(value.shape)
    if visit.given.get("dim", -1) is None:
        return visit.unknown(f"{visit.name} over all")
    if not value.fake.is_floating_point():  # nothing is less than all integers of a type
        return visit.unknown(f"{visit.name} of integers")
    dim, labels = visit.dim("dim", rank, -1), visit.labels
    least = int(visit.given.get("k") or abs(taken(visit.node, value.shape)))
    if dim in value.arrays:
        axis = value.arrays[dim].movedim(dim, -1).flatten(0, -2)
        shrinks = least and not labels.is_fixed(axis) and (len(axis) == 1 or not _placed(visit))
        if shrinks:
            reason = visit.reason(f"chosen by {visit.name}")
            labels.marks.append(Mark("routed", axis, reason, visit.node, least))
        else:
            blocks = " in each block" if len(axis) > 1 else ""
            visit.freeze([axis], f"chosen by {visit.name}{blocks}")
    results = []
    for out in visit.outs:
        arrays: Arrays = {}
        keeps = out.dim() == rank
        for d, size in enumerate(out.shape):
            source = d if keeps or d < dim else d + 1
            if size == 1:
                continue
            if (keeps and d == dim) or source not in value.arrays:
                arrays[d] = labels.fixed(visit.reason(f"a place chosen by {visit.name}"), out.dim())
                continue
            array = labels.collapse(value.arrays[source], dim)
            arrays[d] = array if keeps else array.squeeze(dim)
        results.append(arrays)
    return results


def largest(visit: Visit) -> list[Arrays]:
    """max, min whose place is used are a choice of one; without it, a reduction."""
    chosen = len(visit.outs) > 1 and _placed(visit)
    return choose(visit) if chosen else apply_rule(visit, table()[visit.name])


def _placed(visit: Visit) -> bool:
    """Whether the chosen places are used, not their values alone."""
    slot = CHOICES[visit.name]
    picks = [user.args[1] for user in visit.node.users if user.target is operator.getitem]
    return slot in picks if len(visit.outs) > 1 else True


def look_up(visit: Visit) -> list[Arrays]:
    """index: a pick with a domain unites with the dim that it points at."""
    value = next(visit.values())
    pointed = {}
    for dim, pick in enumerate(indexing.by_dim(visit)):
        if isinstance(pick, Value) and _meets(visit, value, dim, pick):
            pointed[dim] = pick
    return indexing.index(visit, set(pointed))


def _meets(visit: Visit, value: Value, dim: int, pick: Value) -> bool:
    """Unite an index's domain with the labels of the dim that it points at; fix it where these do
    not fit.
    """
    array = value.arrays.get(dim)
    if pick.domain is None:
        return False
    fits = array is not None and array.numel() == value.shape[dim] == len(pick.domain)
    if array is None or not fits:
        visit.freeze([pick.domain], f"an index into the axis picks from another by {visit.name}")
        return False
    visit.labels.unite(pick.domain, array.reshape(-1))
    return True


def gather(visit: Visit) -> list[Arrays]:
    """gather, scatter: the dim that an index with a domain points at is carried by it."""
    value, pick = visit.given["self"], visit.given["index"]
    rank = len(value.shape)
    dim = visit.dim("dim", rank)
    result: Arrays = {}
    known = _meets(visit, value, dim, pick)
    if not known and dim in value.arrays:
        visit.freeze([value.arrays[dim]], f"{visit.name} by data")
    scatters = visit.name.startswith("scatter")
    source = visit.given.get("src")
    others = [pick, source] if scatters and isinstance(source, Value) else [pick]
    for d, size in enumerate(visit.shape):
        if size == 1:
            continue
        if d == dim:
            whole = value.arrays.get(d) if scatters else None
            result[d] = whole if whole is not None else visit.fixed("a place of an index")
            continue
        held = [v.arrays[d] for v in (value, *others) if d in v.arrays]
        held = [visit.labels.collapse(array, dim) for array in held]
        short = any(v.shape[d] != value.shape[d] for v in others)
        result[d] = visit.labels.meet(held) if held else visit.fixed("a place of an index")
        if short:
            visit.freeze([result[d]], f"{visit.name} of a part")
    return [result]


def one_hot(visit: Visit) -> list[Arrays]:
    """one_hot(j, n): the new last dim is the axis that j points at."""
    value = next(visit.values())
    rank = len(visit.shape)
    arrays = {d: a.unsqueeze(-1) for d, a in value.arrays.items()}
    if value.domain is not None and len(value.domain) == visit.shape[-1]:
        arrays[rank - 1] = along(value.domain, rank - 1, rank)
    else:
        visit.freeze([value.domain] if value.domain is not None else [], "one of more classes")
        arrays[rank - 1] = visit.fixed("a class of one_hot")
    return [arrays]


def index_select(visit: Visit) -> list[Arrays]:
    """A pick with a domain is united with the dim that it points at; others fix it."""
    value, pick = visit.given["self"], visit.given["index"]
    dim = visit.dim("dim", len(value.shape))
    if not _meets(visit, value, dim, pick) and dim in value.arrays:
        visit.freeze([value.arrays[dim]], "indexed by data")
    result = {d: visit.labels.collapse(a, dim) for d, a in value.arrays.items() if d != dim}
    if visit.shape[dim] > 1:
        own = pick.arrays.get(0)
        plain = own is not None and own.numel() == visit.shape[dim]
        result[dim] = (
            along(own.reshape(-1), dim, len(visit.shape))  # type: ignore[union-attr]
            if plain
            else visit.fixed("a place of an index")
        )
    return [result]


def embed(visit: Visit) -> list[Arrays]:
    """embedding: a row that an index with a domain points at is carried by it."""
    value, pick = visit.given["weight"], visit.given["indices"]
    if not _meets(visit, value, 0, pick):
        return apply_rule(visit, table()["embedding"])
    rank = len(visit.shape)
    arrays = {d: a.unsqueeze(-1) for d, a in pick.arrays.items()}
    if 1 in value.arrays:
        arrays[rank - 1] = along(visit.labels.alone(value.arrays[1], 1).reshape(-1), rank - 1, rank)
    return [arrays]


LOOKUPS = {"index", "index_select", "gather", "scatter", "scatter_add", "one_hot", "embedding"}
HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {
    "index": look_up,
    **dict.fromkeys(("gather", "scatter", "scatter_add"), gather),
    "one_hot": one_hot,
    "index_select": index_select,
    "embedding": embed,
    **dict.fromkeys(CHOICES, choose),
    **dict.fromkeys(("max", "min"), largest),
}
