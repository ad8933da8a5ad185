"""pieces: parts of an axis that the program takes by themselves (slice, split, index).

    a, b = h[..., :4], h[..., 4:]        units 0-3 are a piece, units 4-7 another

A tensor cannot be empty in the middle of a model, so each piece keeps at least one unit. Where a
choice left a piece empty, the piece's best unit comes back and the least useful unit that can be
spared goes in its block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .groups import Group
from .moves import SAME_DIMS
from .values import Labels, Value
from .visit import op_name

TAKING = SAME_DIMS | {"index", "index_select", "unbind"}


def pieces(
    labels: Labels, component: np.ndarray, group_of: np.ndarray, place: np.ndarray, count: int
) -> list[list[np.ndarray]]:
    """Per group the pieces as unit numbers. A part that holds something of another group, or
    what never goes, cannot become empty.
    """
    found: list[dict[bytes, np.ndarray]] = [{} for _ in range(count)]
    for row in _rows(labels):
        units = component[row]
        group = group_of[units[0]]
        if group >= 0 and (group_of[units] == group).all():
            held = np.unique(place[units])
            found[group][held.tobytes()] = held
    return [list(group.values()) for group in found]


def _rows(labels: Labels) -> Iterator[np.ndarray]:
    """The labels along a taken dim, block by block."""
    for node, value in labels.values.items():
        if op_name(node) not in TAKING:
            continue
        for leaf in value if isinstance(value, list) else [value]:
            for dim, array in leaf.arrays.items() if isinstance(leaf, Value) else ():
                if array.shape[dim] > 1:
                    yield from array.movedim(dim, -1).reshape(-1, array.shape[dim]).numpy()


def apart(found: list[np.ndarray], block_of: np.ndarray) -> int:
    """How many units a block must keep: the most pieces without a common unit inside one."""
    taken: set[int] = set()
    counts = np.zeros(int(block_of.max(initial=0)) + 1, int)
    for piece in sorted(found, key=len):
        if taken.isdisjoint(piece.tolist()) and len(set(block_of[piece].tolist())) == 1:
            taken.update(piece.tolist())
            counts[block_of[piece[0]]] += 1
    return int(counts.max(initial=1))


def with_every_piece(group: Group, kept: Sequence[int], worth: Sequence[float]) -> tuple[int, ...]:
    """`kept` with a unit of each piece; every block keeps as many as before. `worth` [size]."""
    stays = set(kept)
    for piece in group.pieces:
        if stays.isdisjoint(piece.tolist()):
            back = max(piece.tolist(), key=lambda unit: worth[unit])
            block = group.block_of[back]
            spare = [
                unit
                for unit in stays
                if group.block_of[unit] == block and _can_go(group, stays, unit)
            ]
            if spare:
                stays.remove(min(spare, key=lambda unit: (worth[unit], -unit)))
                stays.add(back)
    return tuple(sorted(stays))


def _can_go(group: Group, stays: set[int], unit: int) -> bool:
    """Whether each piece of the unit keeps another one."""
    return all(
        len(stays.intersection(piece.tolist())) > 1 for piece in group.pieces if unit in piece
    )
