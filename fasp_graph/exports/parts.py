"""parts: an encoder-decoder as a folder of ONNX files under Optimum's names.

    encoder_model             input_ids (or the features) [, attention_mask] -> last_hidden_state
    decoder_model             input_ids, encoder_hidden_states [, encoder_attention_mask]
                                  -> logits, present
    decoder_with_past_model   input_ids, past_key_values [, encoder_attention_mask]
                                  -> logits, present of the decoder

The cache of a layer holds key and value of the decoder's own tokens and of the encoder's; the
latter are computed once, by decoder_model. Decoding goes through transformers' own
EncoderDecoderCache; what the plan removed narrows the cache as in fasp_graph/exports/caching.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from passes.capture import Args
from passes.errors import FaspGraphError
from passes.state import steady
from passes.values import OpenAxes

from ..emit.dense import Shrunk, Twin, shrunk
from ..folders.drafts import draft_folder
from .caching import agree, numbers
from .onnx import Form, write_graph
from .part_modules import Encoder, First, Next, own_of

BATCH, LENGTH, PAST = 3, 7, 5
FREE = {0: Dim.AUTO, 1: Dim.AUTO}
SEQUENCE = {0: "batch_size", 1: "sequence_length"}
STATES = {0: "batch_size", 1: "encoder_sequence_length"}


@dataclass(frozen=True)
class Part:
    """One file. `axes`: the names of dynamic axes of each input."""

    name: str
    captured: Shrunk
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shapes: Any
    axes: Mapping[str, Mapping[int, str]]


@dataclass(frozen=True)
class Parts:
    """The three parts. `cache_numbers`: elements that a token of the decoder takes in the cache,
    all layers; `dense_cache_numbers`: before pruning.
    """

    encoder: Part
    first: Part
    later: Part
    cache_numbers: int
    dense_cache_numbers: int

    @property
    def element_size(self) -> int:
        """Bytes of an element of the cache."""
        return int(self.later.captured.inputs[1][0].element_size())

    @property
    def uncut(self) -> tuple[str, ...]:
        """Weights that keep their old size, since the cache cannot follow."""
        parts = (self.encoder, self.first, self.later)
        return tuple(dict.fromkeys(name for part in parts for name in part.captured.uncut))


def parts_of(twin: Twin, inputs: Args) -> Parts:
    """Capture the three parts; VerificationError if together they give other logits than the
    compact model.
    """
    value = _main_input(twin.model, inputs)
    encoder = _encoder(twin, value)
    parts = _decoders(twin, value, encoder)
    verify(parts, twin.compact, value)
    return parts


def export_parts(parts: Parts, folder: Path, metadata: Mapping[str, str], form: Form) -> float:
    """Write the three files; the largest relative difference of each to its graph."""
    worst = 0.0
    with draft_folder(folder) as made:
        for part in (parts.encoder, parts.first, parts.later):
            named = replace(
                form, input_names=part.inputs, output_names=part.outputs, axes=part.axes
            )
            path = made / f"{part.name}.onnx"
            given: Args = (part.captured.inputs, {})
            error = write_graph(
                part.captured.graph_module, given, part.shapes, path, metadata, named
            )
            worst = max(worst, error)
    return worst


def _main_input(model: Any, inputs: Args) -> Tensor:
    name = model.main_input_name
    found = inputs[1].get(name, inputs[0][0] if inputs[0] else None)
    if not isinstance(found, Tensor):
        raise FaspGraphError(f"the example inputs hold no {name} · help: prune with a dict of them")
    return found


def _is_text(value: Tensor) -> bool:
    return not value.is_floating_point()


def _encoder(twin: Twin, value: Tensor) -> Part:
    """Text has a mask and any length; other inputs are dynamic in their batch."""
    model: Any = twin.model
    text = _is_text(value)
    args = (value, torch.ones_like(value)) if text else (value,)
    free = FREE if text else {0: Dim.AUTO}
    shapes = (free,) * len(args)
    captured = shrunk(twin, Encoder(twin.model, model.main_input_name), args, shapes)
    names = (model.main_input_name, "attention_mask")[: len(args)]
    axes = {0: "batch_size", 1: "encoder_sequence_length"} if text else {0: "batch_size"}
    every = dict.fromkeys(names, axes)
    return Part("encoder_model", captured, names, ("last_hidden_state",), shapes, every)


def _decoders(twin: Twin, value: Tensor, encoder: Part) -> Parts:
    text = _is_text(value)
    with torch.no_grad():
        hidden: Tensor = encoder.captured.graph_module(*encoder.captured.inputs)
    width = hidden.shape[-1]
    hidden = torch.randn(BATCH, hidden.shape[1], width, dtype=hidden.dtype)
    mask = [torch.ones(hidden.shape[:2], dtype=torch.long)] if text else []
    model = First(twin.model)
    with torch.no_grad():
        ids = _tokens(twin.model, BATCH, PAST)
        _, past = model(ids, hidden, *mask)
        wider = torch.cat([hidden, hidden[:, :2]], 1) if text else hidden
        _, other = model(_tokens(twin.model, BATCH, PAST + 1), wider)
    lengths = [_differing(a, b) for a, b in zip(past, other, strict=True)]
    grown = [(0, *found) for found in lengths]
    still = [tuple(d for d in range(past[0].dim()) if d not in dims) for dims in grown]
    past = [tensor.clone() for tensor in past]
    later = _next(twin, width, past, mask, grown, still)
    own = own_of(still)
    return Parts(
        encoder,
        _first(twin, hidden, mask, still),
        later,
        numbers(own_of(later.captured.inputs[1]), own),
        numbers(own_of(past), own),
    )


def _differing(left: Tensor, right: Tensor) -> tuple[int, ...]:
    return tuple(d for d in range(left.dim()) if left.shape[d] != right.shape[d])


def _tokens(model: Any, batch: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = model.get_output_embeddings().weight.shape[0]
    return torch.randint(0, size, (batch, length), generator=generator)


def _first(twin: Twin, hidden: Tensor, mask: list[Tensor], still: list[tuple[int, ...]]) -> Part:
    args = (_tokens(twin.model, BATCH, LENGTH), hidden, *mask)
    free = FREE if mask else {0: Dim.AUTO}
    shapes = (FREE, free, *([FREE] if mask else []))
    opened = OpenAxes({}, {1 + k: dims for k, dims in enumerate(still)})
    captured = shrunk(twin, First(twin.model), args, shapes, opened)
    names = ("input_ids", "encoder_hidden_states", "encoder_attention_mask")[: len(args)]
    states = _named(free)
    axes = {names[0]: SEQUENCE, names[1]: states, "encoder_attention_mask": states}
    outputs = ("logits", *cache_names("present", len(still)))
    return Part("decoder_model", captured, names, outputs, shapes, axes)


def _next(
    twin: Twin,
    width: int,
    past: list[Tensor],
    mask: list[Tensor],
    grown: list[tuple[int, ...]],
    still: list[tuple[int, ...]],
) -> Part:
    args = (_tokens(twin.model, BATCH, LENGTH), past, *mask)
    shapes = (FREE, [dict.fromkeys(dims, Dim.AUTO) for dims in grown], *([FREE] if mask else []))
    own = own_of(still)
    opened = OpenAxes(
        {1 + k: dims for k, dims in enumerate(still)}, {1 + k: dims for k, dims in enumerate(own)}
    )
    captured = shrunk(twin, Next(twin.model, width), args, shapes, opened)
    held = cache_names("past_key_values", len(past))
    names = ("input_ids", *held, *(["encoder_attention_mask"] if mask else []))
    axes: dict[str, Mapping[int, str]] = {"input_ids": SEQUENCE, "encoder_attention_mask": STATES}
    for k, (name, dims) in enumerate(zip(held, grown, strict=True)):
        length = "past_sequence_length" if k % 4 < 2 else "encoder_sequence_length"
        axes[name] = dict(zip(dims, ("batch_size", length), strict=False))
    present = own_of(cache_names("present", len(past)))
    return Part("decoder_with_past_model", captured, names, ("logits", *present), shapes, axes)


def cache_names(prefix: str, count: int) -> list[str]:
    """`prefix.layer.decoder.key`, .decoder.value, .encoder.key, .encoder.value, layer by layer."""
    ends = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    return [f"{prefix}.{k // 4}.{ends[k % 4]}" for k in range(count)]


def _named(free: Mapping[int, Any]) -> dict[int, str]:
    return {dim: name for dim, name in STATES.items() if dim in free}


def verify(parts: Parts, reference: nn.Module, value: Tensor) -> None:
    """Some tokens and then some more give the logits of all at once."""
    every = (parts.encoder, parts.first, parts.later)
    encoder, first, later = (part.captured.graph_module for part in every)
    model: Any = reference
    ids = _tokens(model, len(value), LENGTH)
    mask = [torch.ones_like(value)] if _is_text(value) else []
    device = next(reference.parameters()).device
    with steady(reference), torch.no_grad():
        given = {model.main_input_name: value.to(device), "decoder_input_ids": ids.to(device)}
        expected = model.eval()(**given, use_cache=False).logits.cpu()
        hidden = encoder(value, *mask)
        start, past = first(ids[:, :-3], hidden, *mask)
        end, _ = later(ids[:, -3:], past, *mask)
    agree(expected, torch.cat([start, end], 1), "in parts")
