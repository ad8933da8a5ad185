"""Perplexity of a language model in an ONNX file, whatever numbers it computes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from passes.errors import FaspGraphError

from ..evaluate import perplexity

if TYPE_CHECKING:
    import onnxruntime

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}


def session_perplexity(session: onnxruntime.InferenceSession, tokens: Tensor) -> float:
    """Perplexity on windows `tokens` [N, T], as `fasp_graph.perplexity` defines it."""
    return perplexity(_Session(session), tokens)


class _Session(nn.Module):
    """ids [B, T] -> logits [B, T, V], with an empty cache where the file takes one."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        super().__init__()
        self.session = session

    def forward(self, tokens: Tensor) -> Tensor:
        """The first output."""
        feed = {entry.name: _fill(entry, tokens) for entry in self.session.get_inputs()}
        return torch.from_numpy(self.session.run(None, feed)[0])


def _fill(entry: Any, tokens: Tensor) -> np.ndarray:
    if entry.name == "attention_mask":
        return np.ones(tokens.shape, np.int64)
    if entry.name == "position_ids":
        return np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).copy()
    if entry.name.startswith("past_key_values"):
        sizes = [
            size if isinstance(size, int) else len(tokens) if size == "batch_size" else 0
            for size in entry.shape
        ]
        return np.zeros(sizes, _TYPES[entry.type])
    if entry.type != "tensor(int64)" or len(entry.shape) != 2:
        raise FaspGraphError(
            f"perplexity cannot fill the input {entry.name!r} of the ONNX file, which is "
            f"{entry.type} {entry.shape} · help: capture the model with input_ids only"
        )
    return tokens.cpu().numpy()
