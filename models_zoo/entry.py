"""Entry: a model with what is needed to prune it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """`calibration`: batches of the form of `inputs`. `heldout`: token windows [N, T] or None."""

    name: str
    model: nn.Module
    inputs: Any
    calibration: list[Any]
    heldout: Tensor | None = None
    tokenizer: Any = None


def random_entry(name: str, build: Callable[[], nn.Module], batch: Callable[[], Any]) -> Entry:
    """A seeded random model in eval mode, with vectors (biases, norms) moved off their defaults."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.1 if parameter.dim() == 1 else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(0, 0.3)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return Entry(name, model, batch(), [batch() for _ in range(4)])
