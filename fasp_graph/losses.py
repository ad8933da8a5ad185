"""losses: what a short training lowers.

language model          L = (1 - w) CE(next token) + w KL(dense || pruned)        w = weight
                        over the tokens that attention_mask, if there is one, does not hide
any other model         L = sum over outputs of ||f - f_dense||^2 / ||f_dense||^2
no dense model          w = 0; only a language model can be trained so
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.capture import as_args
from passes.compare import tensors
from passes.errors import FaspGraphError

from .evaluate import logits_of, reads_later


@torch.no_grad()
def is_language_model(model: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether the output says the next token, judged at one call: logits [batch, length, more than
    any id] that no later id changes, as it does those of a masked model or behind an encoder.
    """
    ids = _ids(args, kwargs)
    if ids is None or not _speaks(model(*args, **kwargs), ids):
        return False

    def call(given: Tensor) -> Tensor:
        swapped = pytree.tree_map(lambda held: given if held is ids else held, (args, kwargs))
        return logits_of(model(*swapped[0], **swapped[1]))

    return not reads_later(call, ids)


def loss(
    model: nn.Module,
    teacher: nn.Module | None,
    args: Any,
    kwargs: Any,
    weight: float,
    language: bool,
) -> Tensor:
    """L of one call; `teacher`: the dense model; `language`: whether it is a language model."""
    output = model(*args, **kwargs)
    with torch.no_grad():
        dense = None if teacher is None else teacher(*args, **kwargs)
    ids = _ids(args, kwargs)
    if language and ids is not None:
        held = None if dense is None else logits_of(dense)
        return _language_loss(logits_of(output), held, ids, kwargs.get("attention_mask"), weight)
    if dense is None:
        raise FaspGraphError(
            "this is no language model: its outputs do not say the next token, so that its inputs "
            "hold no target · help: distill=the dense model"
        )
    parts = [
        (ours - theirs).float().square().sum() / theirs.float().square().sum().clamp_min(1e-12)
        for ours, theirs in zip(tensors(output), tensors(dense), strict=True)
        if ours.is_floating_point()
    ]
    return torch.stack(parts).sum()


def _language_loss(
    logits: Tensor, dense: Tensor | None, ids: Tensor, mask: Any, weight: float
) -> Tensor:
    told = torch.ones_like(ids, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.shape == ids.shape:
        told = mask > 0
    here = told[:, :-1] & told[:, 1:]
    ours = logits[:, :-1][here].float()
    own = F.cross_entropy(ours, ids[:, 1:][here])
    if dense is None:
        return own
    theirs = dense[:, :-1][here].float().log_softmax(-1)
    gap = F.kl_div(ours.log_softmax(-1), theirs, log_target=True, reduction="batchmean")
    return (1 - weight) * own + weight * gap


def _speaks(output: Any, ids: Tensor) -> bool:
    """Whether an output has the form of logits [batch, length, more than any id]."""
    try:
        logits = logits_of(output)
    except FaspGraphError:
        return False
    named = hasattr(output, "logits") or isinstance(output, Tensor)
    return named and logits.shape[:2] == ids.shape and logits.shape[2] > int(ids.max())


def _ids(args: Any, kwargs: Any) -> Tensor | None:
    held = [kwargs["input_ids"]] if "input_ids" in kwargs else [*args, *kwargs.values()][:1]
    first = held[0] if held and isinstance(held[0], Tensor) else None
    whole = first is not None and first.dim() == 2 and first.dtype == torch.int64
    return first if whole else None


def size(batch: Any) -> int:
    """Tokens of a batch; of inputs that are no ids, samples."""
    args, kwargs = as_args(batch)
    ids = _ids(args, kwargs)
    if ids is not None:
        return ids.numel()
    return next(len(v) for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
