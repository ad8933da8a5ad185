"""The invariant of propagation: every dim of size > 1 has a label array that fits the value."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from .errors import REPORT, UnsupportedOp, where
from .values import Value


def check_covered(node: Node, results: list[Any]) -> None:
    """Every dim of size > 1 has a label array that fits the value's shape."""
    for value in results:
        if not isinstance(value, Value):
            continue
        for dim, size in enumerate(value.shape):
            array = value.arrays.get(dim)
            if size > 1 and array is None:
                raise UnsupportedOp(
                    f"axis {dim} of size {size} lost its labels · {where(node)} · {REPORT}"
                )
            if array is not None and not _fits(array, value.shape):
                raise UnsupportedOp(
                    f"labels of shape {tuple(array.shape)} on {value.shape} · {where(node)} · "
                    f"{REPORT}"
                )


def _fits(array: Tensor, shape: tuple[int, ...]) -> bool:
    return array.dim() == len(shape) and all(
        a in (1, n) for a, n in zip(array.shape, shape, strict=True)
    )
