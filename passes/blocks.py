"""blocks: which units stand in different blocks, read off the label arrays that vary along other
dims than their home (after a view to [heads, channels], say, the labels of channels do).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import Tensor

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
    seen: set[bytes] = set()
    keys: dict[bytes, np.uint64] = {}
    random = np.random.default_rng(2)
    for array, dim in _blocked_arrays(layer.labels.values.values()):
        units = layer.component[array.movedim(dim, -1).reshape(-1, array.shape[dim]).numpy()]
        if not wanted[units].any() or units.tobytes() in seen:
            continue
        seen.add(units.tobytes())
        for row in units:
            held, times = np.unique(row, return_counts=True)
            key = held.tobytes() + times.tobytes()
            if key not in keys:
                keys[key] = random.integers(1, 2**62, dtype=np.uint64)
                tag[held] += keys[key] * times.astype(np.uint64)
    return tag


def _blocked_arrays(values: Iterable[object]) -> Iterable[tuple[Tensor, int]]:
    for value in values:
        for leaf in value if isinstance(value, list) else [value]:
            if isinstance(leaf, Value):
                for dim, array in leaf.arrays.items():
                    if array.numel() != array.shape[dim]:
                        yield array, dim
