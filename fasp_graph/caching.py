"""caching: a decoder as a program that is handed its cache and hands it back.

    (input_ids [B, T], attention_mask [B, P + T], past, position_ids [B, T])
        -> (logits [B, T, V], present)
    past, present: key and value of each layer, [B, H, P, D] and [B, H, P + T, D]

P may be 0: one program serves the prompt and every later token. The cache goes through
transformers' own DynamicCache, so nothing here knows an architecture. Axes of the cache whose
sizes depend neither on the batch nor on the length are open: they shrink with the weights that
fill them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule

from passes.errors import FaspGraphError
from passes.values import OpenAxes

from .dense import Twin, shrunk

BATCH, LENGTH, PAST = 3, 7, 5  # of the example; distinct, so that axes cannot be confused


@dataclass(frozen=True)
class CachedDecoder:
    """`inputs`: (input_ids, attention_mask, past[, position_ids]). `cache_bytes`: per token, all
    layers, of one sequence; `dense_cache_bytes`: of the model before pruning.
    """

    graph_module: GraphModule
    inputs: tuple[Any, ...]
    dynamic_shapes: Any
    cache_bytes: int
    dense_cache_bytes: int

    @property
    def input_names(self) -> list[str]:
        """Optimum's names, in the order of the inputs."""
        past = cache_names("past_key_values", len(self.inputs[2]))
        places = ["position_ids"] * (len(self.inputs) - 3)
        return ["input_ids", "attention_mask", *past, *places]

    @property
    def output_names(self) -> list[str]:
        """Optimum's names, in the order of the outputs."""
        return ["logits", *cache_names("present", len(self.inputs[2]))]


def cache_names(prefix: str, count: int) -> list[str]:
    """`prefix.layer.key`, `prefix.layer.value`, layer by layer."""
    return [f"{prefix}.{k // 2}.{('key', 'value')[k % 2]}" for k in range(count)]


class _Cached(nn.Module):
    """The flat form of a decoder."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        past: list[Tensor],
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """logits, present."""
        cache = filled(past)
        more = {} if position_ids is None else {"position_ids": position_ids}
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            use_cache=True,
            **more,
        )
        return found.logits, flat(cache)


def filled(past: Sequence[Tensor]) -> Any:
    """A DynamicCache that holds keys and values, layer by layer."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in zip(past[::2], past[1::2], strict=True):
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


def flat(cache: Any) -> list[Tensor]:
    """Keys and values of a cache, layer by layer."""
    found = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    if not found or not all(isinstance(tensor, Tensor) for tensor in found):
        raise FaspGraphError(
            "this model's cache is not a key and a value per layer · help: export it without a "
            "cache"
        )
    return found


def keeps_cache(model: nn.Module) -> bool:
    """Whether a model takes and returns past_key_values, and decodes alone."""
    config: Any = getattr(model, "config", None)
    forward = inspect.signature(model.forward).parameters
    alone = config is not None and not getattr(config, "is_encoder_decoder", False)
    return alone and "past_key_values" in forward and "input_ids" in forward


def cached_decoder(twin: Twin) -> CachedDecoder:
    """Capture a decoder with its cache; FaspGraphError where it keeps none of that form."""
    model = twin.model
    if not keeps_cache(model):
        raise FaspGraphError(
            f"{type(model).__name__} takes no input_ids with past_key_values · help: export it "
            "without a cache"
        )
    past = _fresh_cache(model, BATCH, PAST)
    other = _fresh_cache(model, BATCH + 1, PAST + 1)
    roles = [_axes(a.shape, b.shape) for a, b in zip(past, other, strict=True)]
    places = torch.arange(PAST, PAST + LENGTH).repeat(BATCH, 1)
    takes = "position_ids" in inspect.signature(model.forward).parameters
    args = (
        _tokens(model, BATCH, LENGTH),
        torch.ones(BATCH, PAST + LENGTH, dtype=torch.long),
        past,
        *([places] if takes else []),
    )
    free = {0: Dim.AUTO, 1: Dim.AUTO}
    grows = [dict.fromkeys(grown, Dim.AUTO) for grown, _ in roles]
    shapes = (free, free, grows, *([free] if takes else []))
    opened = [still for _, still in roles]
    axes = OpenAxes(
        {2 + k: still for k, still in enumerate(opened)},
        {1 + k: still for k, still in enumerate(opened)},
    )
    captured = shrunk(twin, _Cached(model), args, shapes, axes)
    small = captured.inputs[0][2]
    return CachedDecoder(
        captured.graph_module,
        captured.inputs[0],
        shapes,
        _bytes(small, roles),
        _bytes(past, roles),
    )


def _fresh_cache(model: nn.Module, batch: int, length: int) -> list[Tensor]:
    """What the model caches of `length` tokens, in full (no window)."""
    cache = filled([])
    with torch.no_grad():
        model(input_ids=_tokens(model, batch, length), past_key_values=cache, use_cache=True)
    return [tensor.clone() for tensor in flat(cache)]


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().num_embeddings
    return torch.randint(0, size, (batch, length), generator=generator)


Roles = tuple[tuple[int, ...], tuple[int, ...]]


def _axes(shape: torch.Size, other: torch.Size) -> Roles:
    """The axes that grow with batch and length, and those that do not."""
    grown = tuple(d for d, (n, m) in enumerate(zip(shape, other, strict=True)) if n != m)
    return grown, tuple(d for d in range(len(shape)) if d not in grown)


def _bytes(past: Sequence[Tensor], roles: Sequence[Roles]) -> int:
    """Bytes per token of one sequence."""
    return sum(
        math.prod(tensor.shape[d] for d in still) * tensor.element_size()
        for tensor, (_, still) in zip(past, roles, strict=True)
    )
