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

from passes.capture import Args
from passes.errors import FaspGraphError, VerificationError
from passes.state import steady
from passes.values import OpenAxes
from passes.verify import difference

from ..emit.dense import Twin, shrunk

BATCH, LENGTH, PAST = 3, 7, 5  # of the example; distinct, so that axes cannot be confused
Roles = tuple[tuple[int, ...], tuple[int, ...]]
"""axes of a cached tensor that grow (batch, length), and those that do not"""


@dataclass(frozen=True)
class CachedDecoder:
    """`inputs`: (input_ids, attention_mask, past[, position_ids]). `cache_numbers`: elements per
    token of one sequence, all layers; `dense_cache_numbers`: of the model before pruning.
    `growing`: the axes of batch and length of each tensor of the cache. `uncut`: weights that keep
    their old size, since the cache cannot follow.
    """

    graph_module: GraphModule
    inputs: tuple[Any, ...]
    dynamic_shapes: Any
    cache_numbers: int
    dense_cache_numbers: int
    growing: tuple[tuple[int, int], ...]
    uncut: tuple[str, ...] = ()

    @property
    def element_size(self) -> int:
        """Bytes of an element of the cache."""
        return int(self.inputs[2][0].element_size())

    @property
    def input_names(self) -> list[str]:
        """Optimum's names, in the order of the inputs."""
        past = cache_names("past_key_values", len(self.growing))
        places = ["position_ids"] * (len(self.inputs) - 3)
        return ["input_ids", "attention_mask", *past, *places]

    @property
    def output_names(self) -> list[str]:
        """Optimum's names, in the order of the outputs."""
        return ["logits", *cache_names("present", len(self.growing))]

    @property
    def axes(self) -> dict[str, dict[int, str]]:
        """Names of the dynamic axes of the inputs."""
        ids = {0: "batch_size", 1: "sequence_length"}
        past = cache_names("past_key_values", len(self.growing))
        grown = {
            name: {batch: "batch_size", length: "past_sequence_length"}
            for name, (batch, length) in zip(past, self.growing, strict=True)
        }
        mask = {0: "batch_size", 1: "past_sequence_length + sequence_length"}
        return {"input_ids": ids, "attention_mask": mask, "position_ids": ids, **grown}

    def arguments(self, ids: Tensor, past: Sequence[Tensor] | None = None) -> tuple[Any, ...]:
        """Inputs for tokens [B, T] after a cache of unpadded tokens; None: an empty cache."""
        past = self.cache(len(ids), 0) if past is None else list(past)
        start = past[0].shape[self.growing[0][1]]
        places = torch.arange(start, start + ids.shape[1]).repeat(len(ids), 1)
        mask = torch.ones(len(ids), start + ids.shape[1], dtype=torch.long)
        return (ids, mask, past, *([places] if len(self.inputs) > 3 else []))

    def cache(self, batch: int, length: int) -> list[Tensor]:
        """A cache of random numbers."""
        generator, found = torch.Generator().manual_seed(0), []
        for tensor, (rows, places) in zip(self.inputs[2], self.growing, strict=True):
            sizes = list(tensor.shape)
            sizes[rows], sizes[places] = batch, length
            found.append(torch.randn(sizes, generator=generator).to(tensor.dtype))
        return found

    def cases(self) -> list[Args]:
        """Inputs to compare at: the example, a prompt, a later token."""
        ids = self.inputs[0]
        later = self.arguments(ids[:2, :1], self.cache(2, 2 * PAST))
        return [(self.inputs, {}), (self.arguments(ids[:1, : LENGTH - 2]), {}), (later, {})]


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
    """Capture a decoder with its cache; FaspGraphError where it keeps none of that form,
    VerificationError if a prompt and then some tokens give other logits than the compact model does
    of all at once.
    """
    model = twin.model
    if not keeps_cache(model):
        raise FaspGraphError(
            f"{type(model).__name__} takes no input_ids with past_key_values · help: export it "
            "without a cache"
        )
    past = _fresh_cache(model, BATCH, PAST)
    other = _fresh_cache(model, BATCH + 1, PAST + 1)
    roles = [_axes(a.shape, b.shape) for a, b in zip(past, other, strict=True)]
    if any(len(grown) != 2 for grown, _ in roles):
        raise FaspGraphError(
            f"the cache of {type(model).__name__} does not grow along a batch and a length axis · "
            "help: export it without a cache"
        )
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
    small = captured.inputs[2]
    decoder = CachedDecoder(
        captured.graph_module,
        captured.inputs,
        shapes,
        numbers(small, [still for _, still in roles]),
        numbers(past, [still for _, still in roles]),
        tuple((grown[0], grown[1]) for grown, _ in roles),
        captured.uncut,
    )
    verify(decoder, twin.compact)
    return decoder


def verify(decoder: CachedDecoder, reference: nn.Module) -> None:
    """A prompt and then some tokens give the logits of all at once."""
    ids = decoder.inputs[0][:2]
    device = next(reference.parameters()).device
    with steady(reference), torch.no_grad():
        expected = reference.eval()(input_ids=ids.to(device)).logits.cpu()
        first, past = decoder.graph_module(*decoder.arguments(ids[:, :-3]))
        last, _ = decoder.graph_module(*decoder.arguments(ids[:, -3:], past))
    agree(expected, torch.cat([first, last], 1), "with its cache")


def agree(expected: Tensor, found: Tensor, form: str) -> None:
    """VerificationError where a `form` of the model gives other logits."""
    error = difference(expected, found)
    allowed = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 2e-2
    if not error <= allowed:
        raise VerificationError(
            f"{form} the model gives other logits: off by {error:.1e} (allowed {allowed:.0e}); "
            "nothing was written · help: export it without a cache"
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


def _axes(shape: torch.Size, other: torch.Size) -> Roles:
    """Compared at two batches and two lengths; the batch axis comes first in every cache."""
    grown = tuple(d for d, (n, m) in enumerate(zip(shape, other, strict=True)) if n != m)
    return grown, tuple(d for d in range(len(shape)) if d not in grown)


def numbers(past: Sequence[Tensor], still: Sequence[tuple[int, ...]]) -> int:
    """Elements per token of one sequence; `still`: the axes that do not grow."""
    return sum(
        math.prod(tensor.shape[dim] for dim in dims)
        for tensor, dims in zip(past, still, strict=True)
    )
