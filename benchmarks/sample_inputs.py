"""sample_inputs: example inputs of a transformers model, from its signature and configuration.

An argument's name says what it is (tokens, pixels, spectrogram frames, waveform, boxes); its size
comes from the configuration's attribute of the same meaning. Where several forms are in use,
all are offered, the likeliest first; the caller takes the first that the model runs on.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH, LIMIT = 3, 11, 48
COMPANIONS = (
    "bbox",
    "encoder_hidden_states",
    "input_features_mask",
    "attention_mask",
    "image_grid_thw",
    "grid_thw",
    "input_features",
    "input_values",
    "input_boxes",
    "input_points",
)


def candidates(model: Any) -> Iterator[dict[str, Tensor]]:
    """Keyword inputs to try, at most LIMIT of them."""
    signature = inspect.signature(model.forward).parameters
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = [n for n, p in signature.items() if p.default is p.empty and p.kind not in kinds]
    main = getattr(model, "main_input_name", None)
    seen = 0
    for names in _selections(signature, needed, main, model.config):
        grid = any(name.endswith("grid_thw") for name in names)
        makers = [list(_forms(name, model.config, grid)) for name in names]
        if not all(makers):
            continue
        for values in itertools.islice(itertools.product(*makers), 6):
            yield dict(zip(names, values, strict=True))
            seen += 1
            if seen >= LIMIT:
                return


def _selections(
    signature: Any, needed: list[str], main: str | None, config: Any
) -> Iterator[list[str]]:
    """Sets of arguments: what must be there, then with the main input, then with a decoder's."""
    base = list(dict.fromkeys(needed))
    lead = [main] if main in signature and main not in base else []
    if not base and not lead:
        lead = [n for n in ("input_ids", "pixel_values", "input_features") if n in signature][:1]
    decoder = [n for n in ("decoder_input_ids",) if n in signature and n not in base]
    images = [n for n in ("pixel_values",) if n in signature and n not in base + lead]
    texts = [n for n in ("input_ids",) if n in signature and n not in base + lead]
    tried = []
    encoder_decoder = getattr(config, "is_encoder_decoder", False)
    others = [n for n in COMPANIONS if n in signature and n not in base + lead]
    extras = [lead + decoder, lead, lead + images + decoder, lead + images]
    extras += [lead + [other] + decoder for other in others] + [lead + images + [o] for o in others]
    extras += [texts + images + decoder, texts + images, lead + texts, texts + decoder, texts, []]
    for extra in extras:
        names = list(dict.fromkeys([*extra, *base]))
        if encoder_decoder and decoder and decoder[0] not in names and not tried:
            continue
        if names and names not in tried:
            tried.append(names)
            yield names


def find(config: Any, *names: str) -> Any:
    """The first of these attributes that the configuration or a sub-configuration has."""
    subs = [v for v in vars(config).values() if hasattr(v, "model_type")]
    for name in names:
        for place in (config, *subs):
            value = getattr(place, name, None)
            if value is not None:
                return value
    for place in subs:
        value = find(place, *names)
        if value is not None:
            return value
    return None


def _int(value: Any, default: int) -> int:
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    return value if isinstance(value, int) and not isinstance(value, bool) and value else default


def _forms(name: str, config: Any, grid: bool) -> Iterator[Tensor]:
    """The forms of one argument; with a `grid` of patches, pixels come as rows of patches."""
    torch.manual_seed(0)
    if grid and name in ("pixel_values", "hidden_states"):
        yield from _patches(config)
    elif name in FORMS:
        yield from FORMS[name](config)
    elif name.endswith("attention_mask"):
        yield torch.ones(BATCH, LENGTH, dtype=torch.long)
    elif name.endswith("input_ids") or name.endswith("_ids"):
        yield from _tokens(config)
    elif "pixel" in name or "image" in name:
        yield from _pixels(config)
    elif name == "hidden_states" and find(config, "patch_size"):
        yield from _patches(config)
    elif "embeds" in name or name in ("hidden_states", "encoder_hidden_states"):
        yield torch.randn(BATCH, LENGTH, _int(find(config, "hidden_size", "d_model"), 32))
    elif "values" in name or "features" in name:
        yield from _frames(config)


def _tokens(config: Any) -> Iterator[Tensor]:
    books = _int(find(config, "num_codebooks"), 1)
    sizes = [(BATCH * books, LENGTH)] if books > 1 else []  # of one sample in adjacent rows
    for batch, length in ((BATCH, LENGTH), *sizes, (2, 16), (2, 64), (2, 128)):
        top = min(90, _int(find(config, "vocab_size"), 110) - 1)
        yield torch.randint(min(3, top - 1), top, (batch, length))


def _decoder(config: Any) -> Iterator[Tensor]:
    yield torch.randint(3, 80, (BATCH, 7))


def _pixels(config: Any) -> Iterator[Tensor]:
    channels = _int(find(config, "num_channels", "in_channels", "in_chans", "image_channels"), 3)
    channels = channels if channels <= 16 else 3
    size = find(config, "image_size", "img_size", "input_size", "resolution")
    sizes = [tuple(size)[-2:]] if isinstance(size, (list, tuple)) and len(size) > 1 else []
    if isinstance(size, dict):
        sizes = [(size.get("height", 64), size.get("width", 64))]
    if isinstance(size, int):
        sizes = [(size, size)]
    frames = _int(find(config, "num_frames", "frames_per_clip"), 0)
    for height, width in [*sizes, (64, 64), (224, 224)]:
        if frames:
            yield torch.randn(2, frames, channels, height, width)
        yield torch.randn(BATCH, channels, height, width)
    patch = _int(find(config, "patch_size"), 16)
    yield torch.randn(2, 16, channels * patch * patch)
    yield torch.randn(2, 2, channels, *(sizes or [(64, 64)])[0])


def _frames(config: Any) -> Iterator[Tensor]:
    bins = _int(
        find(
            config,
            "num_mel_bins",
            "feature_size",
            "input_feat_per_channel",
            "n_mels",
            "mel_dim",
            "feature_projection_input_dim",
            "input_channels",
            "num_input_channels",
            "audio_channels",
            "input_size",
            "hidden_size",
        ),
        80,
    )
    length = _int(find(config, "max_length", "max_source_positions", "max_position_embeddings"), 64)
    double = 2 * _int(find(config, "max_source_positions"), 32)
    yield torch.randn(BATCH, bins, double)
    yield torch.randn(BATCH, 64, bins)
    yield torch.randn(BATCH, length, bins)
    yield torch.randn(BATCH, 1, 64, bins)
    yield torch.randn(BATCH, 1, 4096)


def _wave(config: Any) -> Iterator[Tensor]:
    bins = _int(find(config, "num_mel_bins"), 0)
    if bins:
        yield torch.randn(BATCH, _int(find(config, "max_length"), 64), bins)
    yield torch.randn(BATCH, 4000)
    yield torch.randn(BATCH, _int(find(config, "audio_channels"), 1), 4096)
    yield torch.randn(2, 16000)


def _boxes(config: Any) -> Iterator[Tensor]:
    corner = torch.randint(0, 40, (BATCH, LENGTH, 2))
    yield torch.cat([corner, corner + torch.randint(1, 40, (BATCH, LENGTH, 2))], -1)


def _series(config: Any) -> Iterator[Tensor]:
    length = _int(find(config, "context_length"), 32)
    channels = _int(find(config, "num_input_channels"), 0)
    lags = max(find(config, "lags_sequence") or [0])
    if channels:
        yield torch.randn(BATCH, length, channels)
    yield torch.randn(BATCH, length + lags)
    yield torch.randn(BATCH, 2 * length)


def _codes(config: Any) -> Iterator[Tensor]:
    books = _int(find(config, "num_quantizers", "num_codebooks", "n_codebooks"), 8)
    yield torch.randint(0, 16, (BATCH, books, LENGTH))
    yield torch.randint(0, 16, (BATCH, LENGTH, books))


def _past_time(config: Any) -> Iterator[Tensor]:
    (values, *_) = _series(config)
    yield torch.randn(*values.shape, find(config, "num_time_features") or 0)


def _past_mask(config: Any) -> Iterator[Tensor]:
    (values, *_) = _series(config)
    yield torch.ones(values.shape)


def _patches(config: Any) -> Iterator[Tensor]:
    """Rows of pixels, as many as GRID says."""
    channels = _int(find(config, "num_channels", "in_channels", "in_chans"), 3)
    patch = _int(find(config, "patch_size"), 16)
    frames = _int(find(config, "temporal_patch_size"), 1)
    rows = BATCH * GRID[0] * GRID[1] * GRID[2]
    yield torch.randn(rows, channels * frames * patch * patch)
    yield torch.randn(BATCH, 16, 2 + channels * patch * patch)


def _grid(config: Any) -> Iterator[Tensor]:
    yield torch.tensor([GRID] * BATCH)


def _ones(config: Any) -> Iterator[Tensor]:
    yield torch.ones(BATCH, dtype=torch.long)


GRID = (1, 4, 8)  # frames, rows, columns of patches of one image

FORMS = {
    "flattened_patches": _patches,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "merge_sizes": _ones,
    "input_ids": _tokens,
    "decoder_input_ids": _decoder,
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _frames,
    "input_values": _wave,
    "bbox": _boxes,
    "past_values": _series,
    "past_time_features": _past_time,
    "past_observed_mask": _past_mask,
    "audio_codes": _codes,
    "spectrogram": _frames,
}
