"""Reading and writing at places that data point at: their dims are fixed, the others carried.

x[i]                x's dim is fixed, the dims of i and the rest carried
x[mask]             x[i, j] with the places (i, j) where the mask holds, as many as the data want
x[i] = y            the dims of i and x's dim are fixed, the rest carried
x[mask] = y         the same; where y is alike for all places, where(mask, y, x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .values import Arrays, Value, along
from .visit import Visit

MASKS = (torch.bool, torch.uint8)


def index(visit: Visit, pointed: frozenset[int] | set[int] = frozenset()) -> list[Arrays]:
    """Indexing by data: the indexed dims are fixed (but those `pointed` at by an index that
    carries them), the index's own dims and the rest carried.
    """
    value = next(visit.values())
    indices = by_dim(visit)
    at = [d for d, item in enumerate(indices) if isinstance(item, Value)]
    picks = [indices[d] for d in at]
    rank = max(len(pick.shape) for pick in picks)
    together = at == list(range(at[0], at[-1] + 1))
    start = at[0] if together else 0
    kept = [d for d in range(len(value.shape)) if d not in at]
    order = [d for d in kept if d < at[0]] if together else []
    places = [*order, *([None] * rank), *[d for d in kept if d not in order]]
    held = [value.arrays[d] for d in at if d in value.arrays and d not in pointed]
    visit.freeze(held, "indexed by data")
    result: Arrays = {}
    for home, dim in enumerate(places):
        if visit.shape[home] == 1:
            continue
        if dim is None:
            held = _aligned(picks, home - start, rank, places)
            result[home] = visit.labels.meet(held) if held else visit.fixed("an index")
        else:
            array = value.arrays[dim]
            for d in at:
                array = visit.labels.collapse(array, d)
            result[home] = _rearranged(array, places)
    return [result]


def _aligned(
    picks: list[Value], position: int, rank: int, places: list[int | None]
) -> list[Tensor]:
    found = []
    for pick in picks:
        dim = position - rank + len(pick.shape)
        if dim in pick.arrays and pick.arrays[dim].numel() == pick.arrays[dim].shape[dim]:
            vector = pick.arrays[dim].reshape(-1)
            found.append(along(vector, places.index(None) + position, len(places)))
    return found


def _rearranged(array: Tensor, places: list[int | None]) -> Tensor:
    order = [d for d in places if d is not None]
    moved = array.permute([*order, *(d for d in range(array.dim()) if d not in order)])
    moved = moved.reshape([array.shape[d] for d in order])
    shape = iter(moved.shape)
    return moved.reshape([1 if d is None else next(shape) for d in places])


def by_dim(visit: Visit) -> list[Any]:
    """The indices, one for each dim that they stand at. x[mask] is x[i, j] with the places (i, j)
    where the mask holds: as many as the data want, none of which can go.
    """
    found: list[Any] = []
    for item in visit.given["indices"]:
        if isinstance(item, Value) and item.fake.dtype in MASKS:
            visit.freeze(list(item.arrays.values()), f"a mask of {visit.name}")
            found += [Value(torch.empty(0))] * len(item.shape)
        else:
            found.append(item)
    return found


def index_put(visit: Visit) -> list[Arrays]:
    """Writing at places given by data: those dims are fixed, the others carried. What is written
    alike wherever a mask holds (0, a mask token) is a choice between two elements: all are carried.
    """
    value, *_ = visit.values()
    source, picks = visit.given["values"], [i for i in visit.given["indices"] if i is not None]
    rank, mask = len(value.shape), picks[0]
    masked = len(picks) == 1 and mask is visit.given["indices"][0] and mask.fake.dtype in MASKS
    if masked and len(source.shape) <= rank - len(mask.shape):
        return [_chosen(visit, value, mask, source)]
    indices = by_dim(visit)
    at = [d for d, item in enumerate(indices) if isinstance(item, Value)]
    result = dict(value.arrays)
    visit.freeze([result[d] for d in at if d in result], "written by an index")
    visit.freeze([a for d in at for a in indices[d].arrays.values()], "written by an index")
    if at != list(range(len(at))):
        return visit.unknown(f"{visit.name} by data")
    for dim, array in source.arrays.items():
        home = dim - len(source.shape) + rank
        if home >= len(at) and home in result and array.numel() == array.shape[dim]:
            result[home] = visit.labels.meet([result[home], along(array.reshape(-1), home, rank)])
        else:
            visit.freeze([array], "written by an index")
    return [result]


def _chosen(visit: Visit, value: Value, mask: Value, source: Value) -> Arrays:
    """where(mask, source, value): the mask's dims are aligned from the first."""
    rank = len(value.shape)
    lead, trail = [1] * (rank - len(source.shape)), [1] * (rank - len(mask.shape))
    result: Arrays = {}
    for dim, array in value.arrays.items():
        held, back = [array], dim - len(lead)
        if dim in mask.arrays:
            held.append(mask.arrays[dim].reshape([*mask.arrays[dim].shape, *trail]))
        if back in source.arrays:
            held.append(source.arrays[back].reshape([*lead, *source.arrays[back].shape]))
        result[dim] = visit.labels.meet(held)
    visit.labels.mark("bent", result.values(), visit.name)
    return result


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = dict.fromkeys(
    ("index_put", "_index_put_impl"), index_put
)
