"""What a command works on: a model by its text (fasp_graph/targets.py), its data, its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.capture import as_args, placed
from passes.errors import CalibrationError, ConfigError, FaspGraphError

from .corpora import (
    image_batches,
    image_files,
    is_factory,
    made,
    refuse_missing,
    text_of,
)
from .scale.devices import device_of
from .targets import Target, model_of


def load_target(
    text: str,
    calibration: Any = None,
    length: int = 256,
    count: int = 64,
    evaluation: Any = None,
    stream: bool = False,
    device: str | None = None,
) -> Target:
    """The target that `text` names, with calibration and evaluation data of fasp_graph/corpora.py;
    `length`, `count`: tokens per window and windows (or images) at most. `stream`: a folder whose
    weights are read one by one (fasp_graph/scale/streaming.py). `device`: where model and example
    inputs go.
    """
    if device is not None and stream:
        raise ConfigError(
            "--stream leaves the weights in their folder, --device would move them · help: "
            f"--compute-on {device}, where each weight is copied when its layer runs"
        )
    place = None if device is None else device_of(device)
    target = replace(model_of(text, stream), source=text)
    if calibration is not None:
        target = replace(
            target, calibration=calibration_batches(target, str(calibration), length, count)
        )
    if evaluation is not None:
        target = replace(target, heldout=heldout_tokens(target, str(evaluation), length, count))
    if place is None:
        return target
    model = target.model.to(place)
    return replace(target, model=model, inputs=placed(target.inputs, place))


def calibration_batches(target: Target, source: str, length: int, count: int) -> list[Any]:
    """Batches like the target's inputs, of a factory, a folder of images, or text."""
    if is_factory(source) and not Path(source).exists():
        return _batches(made(source), source)
    if files := image_files(source):
        return image_inputs(target, files[:count])
    refuse_missing(source)
    if target.tokenizer is None:
        raise CalibrationError(
            f"{target.name} has no tokenizer, so text cannot calibrate it{_absent(source)} · help: "
            "pass package.module:factory, a function that returns batches like the inputs"
        )
    refuse_long(target, length)
    windows = windows_of(text_of(source), target.tokenizer, length, count, source)
    return [like(target.inputs, batch) for batch in windows.split(8)]


def heldout_tokens(target: Target, source: str, length: int, count: int | None) -> Tensor:
    """[N, length] windows of the text that perplexity is measured on."""
    if is_factory(source) and not Path(source).exists():
        found = made(source)
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise FaspGraphError(
                f"{source} returned {type(found).__name__} · help: --evaluation and --data take a "
                "function that returns ids [windows, length]"
            )
        return found
    refuse_missing(source)
    if target.tokenizer is None:
        raise FaspGraphError(
            f"{target.name} has no tokenizer, so it has no perplexity on text{_absent(source)} · "
            "help: pass package.module:factory, a function that returns tokens [windows, length]"
        )
    refuse_long(target, length)
    return windows_of(text_of(source, evaluation=True), target.tokenizer, length, count, source)


def _batches(found: Any, source: str) -> list[Any]:
    """What a factory returned, as batches like the inputs."""
    if not isinstance(found, Iterable) or isinstance(found, (str, bytes, Tensor, Mapping)):
        raise CalibrationError(
            f"{source} returned {type(found).__name__}, not batches · help: --calibration (of "
            "recover --data) takes a function that returns a list of batches like the inputs"
        )
    return list(found)


def refuse_long(target: Target, length: int) -> None:
    """ConfigError if windows of `length` tokens go beyond the positions that the model's
    configuration states.
    """
    config: Any = getattr(target.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(text, "max_position_embeddings", None)
    if isinstance(positions, int) and length > positions:
        raise ConfigError(
            f"{target.name} has {positions} positions (max_position_embeddings), fewer than "
            f"windows of {length} tokens · help: --length {positions}, or less"
        )


def _absent(source: str) -> str:
    return "" if Path(source).exists() else f"; nor is {source} a file or folder here"


def image_inputs(target: Target, files: list[Path]) -> list[Any]:
    """Image files as batches like the target's inputs."""
    held = list(target.inputs.values()) if isinstance(target.inputs, dict) else [target.inputs]
    example = next((v for v in as_args(held[0])[0] if isinstance(v, Tensor)), None)
    if example is None or example.dim() != 4:
        raise CalibrationError(
            f"{target.name} takes no images [batch, channels, height, width] · help: give text, or "
            "package.module:factory, a function that returns batches like the inputs"
        )
    channels, height, width = map(int, example.shape[1:])
    batches = image_batches(files, (channels, height, width), *target.pixels)
    if not isinstance(target.inputs, dict):
        return [(b,) if isinstance(target.inputs, (tuple, list)) else b for b in batches]
    return [{next(iter(target.inputs)): batch} for batch in batches]


def windows_of(
    text: str,
    tokenizer: Any,
    length: int,
    count: int | None,
    source: str = "the text",
    stride: int | None = None,
) -> Tensor:
    """[N, length] windows of the tokens of a text, `stride` (None: length) tokens apart; at most
    `count`, spread evenly over it.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    total = len(ids) // length
    if not total:
        raise CalibrationError(
            f"{source} has {len(ids)} tokens, fewer than one window of {length} · help: give a "
            "longer text, or a smaller --length"
        )
    rows = torch.tensor(ids).unfold(0, length, stride or length)
    total = len(rows)
    if count is None or count >= total:
        return rows.clone()
    return rows[torch.linspace(0, total - 1, count).round().long()].clone()


def like(inputs: Any, tokens: Tensor) -> Any:
    """`tokens` in the form of the example inputs."""
    if isinstance(inputs, dict):
        filled = {"input_ids": tokens}
        if "attention_mask" in inputs:
            filled["attention_mask"] = torch.ones_like(tokens)
        constants = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        return {**constants, **filled}
    return (tokens,) if isinstance(inputs, (tuple, list)) else tokens
