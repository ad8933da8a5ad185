"""Windows of an image as columns, and back.

im2col   [n, c, x, y] -> [n, c * k, windows]     a channel owns k rows in a run
col2im   [n, c * k, windows] -> [n, c, x, y]     what overlaps is added

Zeros at the edges belong to the channel: the channel is carried, positions are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from .values import Arrays, along
from .visit import Visit


def _fixed_places(visit: Visit, channel: int) -> tuple[Arrays, Arrays]:
    """What is kept of the leading dims, and fixed labels for the places of the result."""
    value = next(visit.values())
    visit.freeze([a for d, a in value.arrays.items() if d > channel], f"a place of {visit.name}")
    lead = {d: a for d, a in value.arrays.items() if d < channel}
    places = {
        d: visit.fixed(f"a place of {visit.name}")
        for d in range(channel + 1, len(visit.shape))
        if visit.shape[d] > 1
    }
    kept = {
        d: along(visit.labels.alone(array, d).reshape(-1), d, len(visit.shape))
        for d, array in lead.items()
    }
    return kept, places


def _channels(visit: Visit, channel: int) -> Arrays:
    """The channel's labels without blocks, as a vector under its dim; empty if it has none."""
    value = next(visit.values())
    array = value.arrays.get(channel)
    if array is None or visit.labels.is_fixed(array):
        return {} if array is None else {channel: array.reshape(-1)}
    array = visit.labels.alone(array, channel)
    return {channel: array.expand([n if k == channel else 1 for k, n in enumerate(value.shape)])}


def unfold(visit: Visit) -> list[Arrays]:
    """im2col: the rows of a channel's windows are one unit."""
    channel = len(next(visit.values()).shape) - 3
    lead, places = _fixed_places(visit, channel)
    result = {**lead, **places}
    for dim, array in _channels(visit, channel).items():
        times = math.prod(visit.given["kernel_size"])
        vector = array.reshape(-1)
        vector = vector.repeat_interleave(times) if len(vector) > 1 else vector
        result[dim] = along(vector, dim, len(visit.shape))
    return [{d: a for d, a in result.items() if visit.shape[d] > 1}]


def fold(visit: Visit) -> list[Arrays]:
    """col2im: the rows that are added into one channel go together."""
    channel = len(next(visit.values()).shape) - 2
    lead, places = _fixed_places(visit, channel)
    result = {**lead, **places}
    for dim, array in _channels(visit, channel).items():
        vector = array.reshape(-1)
        if len(vector) > 1:
            rows = vector.reshape(visit.shape[dim], -1)
            vector = visit.labels.collapse(rows, 1).reshape(-1)
        result[dim] = along(vector, dim, len(visit.shape))
    return [{d: a for d, a in result.items() if visit.shape[d] > 1}]


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = {"im2col": unfold, "col2im": fold}
