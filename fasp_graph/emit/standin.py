"""standin: a lazy model with other numbers, which cost neither a file nor memory.

How a class can be made smaller depends on its code and shapes, so the search for it (some twenty
runs) need not read a checkpoint: every weight is a piece of one random buffer, made when an op
asks for it. What the search finds is judged once more on the true weights.
"""

from __future__ import annotations

import copy
import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.capture import Captured
from passes.kernels import widen
from passes.lazy import Lazy, replace
from passes.removal import Removal
from passes.rewrite import rewrite

SLACK = 1 << 16  # pieces start at different places of the buffer


def stand_in(model: nn.Module, captured: Captured, cut: Removal) -> tuple[nn.Module, GraphModule]:
    """The model and its compact graph, on the same drawn numbers."""
    largest = max(parameter.numel() for parameter in model.parameters())
    numbers = torch.randn(largest + SLACK, generator=torch.Generator().manual_seed(0))
    double = copy.deepcopy(model)
    replace(double, lambda name, held: Lazy(held.shape, held.dtype, _piece(numbers, name, held)))
    held = dict(double.named_parameters(remove_duplicate=False))
    graph = copy.deepcopy(captured.graph_module)
    replace(graph, lambda name, _: held.get(name))
    return double, widen(rewrite(graph, cut), captured.inputs)


def _piece(numbers: Tensor, name: str, like: Tensor) -> Any:
    """A reader: deviation 1 / sqrt(inputs) for matrices, near 1 for vectors."""
    start, count, shape = zlib.crc32(name.encode()) % SLACK, like.numel(), like.shape
    dtype, fan = like.dtype, math.prod(shape[1:])

    def read() -> Tensor:
        piece = numbers[start : start + count].view(shape)
        return (piece / math.sqrt(fan) if len(shape) > 1 else 1 + piece / 10).to(dtype)

    return read
