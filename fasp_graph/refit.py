"""refit: a consumer's new weight, by the repair and the ridge of the options, in the basis that its
units are of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from passes.drift import Drift
from passes.observe import Moments
from passes.restore import Restored, restore
from passes.ridge import held_out_ridge
from passes.rotate import turned, turned_drift, turned_moments

from .config import HELD_OUT, Config


class Turn(NamedTuple):
    """Q of a group (passes/rotate.py), and the columns of a consumer that it turns."""

    maps: Tensor
    columns: Tensor


def folds(config: Config) -> tuple[int | None, ...]:
    """The parts of the tokens whose moments a repair needs (passes/observe.py, `fold`)."""
    return (0, 1) if config.ridge == HELD_OUT else (None,)


def whole(parts: Sequence[Moments]) -> Moments:
    """Of all tokens."""
    return sum(parts[1:], start=parts[0])


def cut(matrix: Tensor, keep: Tensor, turn: Turn | None = None) -> Tensor:
    """The matrix without the columns that go, and nothing repaired."""
    if turn is None:
        return matrix * keep
    own = turned(matrix, 1, turn.columns, turn.maps) * keep
    return turned(own, 1, turn.columns, turn.maps.mT)


def refit(
    config: Config,
    matrix: Tensor,
    bias: Tensor | None,
    parts: Sequence[Moments],
    keep: Tensor,
    drift: Drift | None = None,
    turn: Turn | None = None,
) -> tuple[Restored, tuple[float, ...]]:
    """The repaired matrix, and the ridge if it was chosen. `parts`: moments for each of `folds`."""
    if turn is not None:
        columns, maps = turn.columns, turn.maps
        matrix = turned(matrix, 1, columns, maps)
        parts = [turned_moments(part, columns, maps) for part in parts]
        drift = drift and turned_drift(drift, columns, maps)
    method, chosen = config.passes.restore, tuple[float, ...]()
    if len(parts) > 1 and all(part.tokens for part in parts) and method not in ("none", "bias"):
        chosen = (held_out_ridge(method, matrix, bias, parts[0], parts[1], keep),)
    (ridge,) = chosen or (config.damping,)
    found = restore(method, matrix, bias, whole(parts), keep, ridge, drift)
    if turn is not None:
        found = replace(found, weight=turned(found.weight, 1, columns, maps.mT))
    return found, chosen
