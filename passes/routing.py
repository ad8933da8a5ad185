"""Indexing by data: lookups fix the axis that they point at, unless the index itself carries it.

The indices that topk, sort and argmax return point at positions of a labelled axis: their `domain`.
Where such an index meets an axis again (the experts' weights, a gather, a scatter), the labels of
the axis and of the domain unite instead of being frozen, and removing a position renumbers both.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import moves
from .values import Arrays
from .visit import Visit


def domains(visit: Visit) -> list[Tensor | None]:
    """The domain of each result, None where its values point at no labelled axis."""
    return [None] * len(visit.outs)


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {
    "index": moves.index,
}
