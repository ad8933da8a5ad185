"""blocks: which units stand in different blocks, read off the label arrays that vary along other
dims than their home (after a view to [heads, channels], say, the labels of channels do), and off
the parts that an op takes an axis in (the groups of a group norm).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from .groups import Layer
from .values import Labels, Value, varying


def has_blocks(labels: Labels) -> bool:
    """Whether any dim of the program is split into blocks, so that the run on blocks can tell."""
    return any(
        len(varying(array)) > 1
        for value in labels.values.values()
        for leaf in (value if isinstance(value, list) else [value])
        if isinstance(leaf, Value)
        for array in leaf.arrays.values()
    )


def block_tags(layer: Layer, wanted: np.ndarray) -> np.ndarray:
    """A tag per component; components with different tags stand in different blocks of some
    array, or in different multiplicities.
    """
    tag = np.zeros(len(wanted), np.uint64)
    keys: dict[bytes, np.uint64] = {}
    random = np.random.default_rng(2)
    for units in rows_of(layer):
        if not wanted[units].any():
            continue
        for row in units:
            held, times = np.unique(row, return_counts=True)
            key = held.tobytes() + times.tobytes()
            if key not in keys:
                keys[key] = random.integers(1, 2**62, dtype=np.uint64)
                tag[held] += keys[key] * times.astype(np.uint64)
    return tag


def rows_of(layer: Layer) -> Iterable[np.ndarray]:
    """Components [blocks, units] of every array that varies along more than its home, once each,
    and of the parts that an op takes an axis in. The two parts of a complex number are no block.
    """
    pairs = (layer.component[array.numpy()].reshape(-1, 2) for array in layer.labels.pairs)
    seen = {_key(units) for units in pairs}
    for value in layer.labels.values.values():
        for leaf in value if isinstance(value, list) else [value]:
            for dim, array in leaf.arrays.items() if isinstance(leaf, Value) else ():
                if array.numel() == array.shape[dim]:
                    continue
                units = layer.component[
                    array.movedim(dim, -1).reshape(-1, array.shape[dim]).numpy()
                ]
                if _key(units) not in seen:
                    seen.add(_key(units))
                    yield units
    yield from (layer.component[array.numpy()] for array in layer.labels.parts)


def _key(units: np.ndarray) -> tuple[int, bytes]:
    return units.shape[-1], units.tobytes()
