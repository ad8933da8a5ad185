"""Measures of models that are no language models, and of tasks.

accuracy     share of samples whose largest logit is their label
similarity   mean cosine between the vectors that two encoders give the same text; a text's vector
             is the mean of its last hidden states over the tokens that the mask keeps
tasks        accuracies of lm-evaluation-harness, zero-shot unless said (extra `evaluation`)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.capture import as_args, beside
from passes.compare import tensors
from passes.errors import CalibrationError, FaspGraphError
from passes.state import steady


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Any, Tensor]]) -> float:
    """`batches`: (inputs, labels [B]); the model's first output is [B, classes]."""
    hits, count = 0, 0
    for inputs, labels in batches:
        args, kwargs = beside(model, as_args(inputs))
        with steady(model):
            logits = tensors(model(*args, **kwargs))[0]
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise FaspGraphError(
                f"accuracy needs logits [batch, classes] and labels [batch], not "
                f"{tuple(logits.shape)} and {tuple(labels.shape)} · help: give a classifier "
                "pairs of inputs and labels"
            )
        hits += int((logits.argmax(1).cpu() == labels.cpu()).sum())
        count += len(labels)
    if not count:
        raise CalibrationError("no samples to measure accuracy on · help: give at least one batch")
    return hits / count


@torch.no_grad()
def embeddings(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """[texts, width], each of length one."""
    rows = []
    for batch in batches:
        args, kwargs = beside(model, as_args(batch))
        with steady(model):
            states = tensors(model(*args, **kwargs))[0].float()
        if states.dim() == 3:
            mask = kwargs.get("attention_mask")
            weight = torch.ones_like(states[..., :1]) if mask is None else mask[..., None].float()
            states = (states * weight).sum(1) / weight.sum(1).clamp_min(1)
        if states.dim() != 2:
            raise FaspGraphError(
                f"an embedding is made of [batch, width] or [batch, length, width], not "
                f"{tuple(states.shape)} · help: give a text encoder"
            )
        rows.append(F.normalize(states, dim=1))
    if not rows:
        raise CalibrationError("no texts to embed · help: give at least one batch")
    return torch.cat(rows)


def similarity(model: nn.Module, dense: nn.Module, batches: Iterable[Any]) -> float:
    """Mean cosine of the embeddings of two models."""
    held = list(batches)
    return float((embeddings(model, held) * embeddings(dense, held)).sum(1).mean())


def tasks(
    model: nn.Module, tokenizer: Any, names: list[str], limit: int | None
) -> dict[str, float]:
    """Task -> accuracy (length-normalised where the task has it), by lm-evaluation-harness."""
    try:
        harness: Any = importlib.import_module("lm_eval")
        wrapper: Any = importlib.import_module("lm_eval.models.huggingface").HFLM
    except ImportError as error:
        raise FaspGraphError(
            "tasks need lm-evaluation-harness · help: pip install 'fasp-graph[evaluation]'"
        ) from error
    held = wrapper(pretrained=model, tokenizer=tokenizer)
    found = harness.simple_evaluate(model=held, tasks=names, limit=limit)["results"]
    return {name: _accuracy(name, figures) for name, figures in found.items()}


def _accuracy(name: str, figures: dict[str, Any]) -> float:
    for key in ("acc_norm,none", "acc,none"):
        if key in figures:
            return float(figures[key])
    raise FaspGraphError(
        f"the task {name} has no accuracy, but {', '.join(figures)} · help: a task of choices has"
    )
