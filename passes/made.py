"""made: tensors in the form of another, of which no number is read.

    zeros_like(f)     has the shape of f, and labels of its own

What they meet decides which of their places go. Where these are others than those of f, the
rewriter makes them by size (passes/edits.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .values import Arrays
from .visit import Visit

aten = torch.ops.aten
BY_SIZE = {
    "zeros_like": aten.new_zeros.default,
    "ones_like": aten.new_ones.default,
    "full_like": aten.new_full.default,
    "empty_like": aten.new_empty.default,
}


def made_like(visit: Visit) -> list[Arrays]:
    """New labels in the pattern of those of the form; what never goes there never goes here."""
    labels, value = visit.labels, next(visit.values())
    return [
        {
            dim: array
            if labels.is_fixed(array)
            else labels.fresh("free", visit.node.name, dim, array.numel()).view(array.shape)
            for dim, array in value.arrays.items()
        }
    ]


HANDLERS: dict[str, Callable[[Visit], list[Arrays]]] = dict.fromkeys(BY_SIZE, made_like)
