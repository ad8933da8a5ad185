"""Complex numbers as pairs of real ones.

view_as_complex   [..., d, 2] -> [..., d]     a pair goes together: one label for both parts
view_as_real      [..., d] -> [..., d, 2]     the parts are positions of their own
"""

from __future__ import annotations

from collections.abc import Callable

from .values import Arrays, varying
from .visit import Visit


def to_complex(visit: Visit) -> list[Arrays]:
    """Labels that vary over the last dim unite in pairs; they move to the innermost dim left."""
    value = next(visit.values())
    last, labels = len(value.shape) - 1, visit.labels
    result: Arrays = {}
    for dim, array in value.arrays.items():
        if dim != last:
            result[dim] = labels.collapse(array, last).squeeze(last)
    pairs = value.arrays.get(last)
    if pairs is None or labels.is_fixed(pairs):
        return [result]
    labels.pairs.append(pairs.expand([*pairs.shape[:last], 2]))
    pairs = labels.collapse(pairs, last).squeeze(last)
    homes = varying(pairs)
    if not homes:
        visit.freeze([pairs], "the parts of a complex number")
        return [result]
    held = result.get(homes[-1])
    free = held is None or labels.is_block(held)
    result[homes[-1]] = pairs if free else labels.meet([held, pairs])  # type: ignore[list-item]
    return [result]


def to_real(visit: Visit) -> list[Arrays]:
    """The two parts of a number are a dim that never goes."""
    value = next(visit.values())
    arrays = {dim: array.unsqueeze(-1) for dim, array in value.arrays.items()}
    return [{**arrays, len(value.shape): visit.fixed("the parts of a complex number")}]


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {
    "view_as_complex": to_complex,
    "view_as_real": to_real,
}
