"""What the command line prunes: a text -> model, example inputs, calibration, held-out tokens.

zoo:NAME                  a model of models_zoo
FOLDER                    a Hugging Face folder, or one that `save` wrote
package.module:factory    a function that returns (model, inputs) or (model, inputs, calibration)
owner/name                a model of the Hugging Face hub
"""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
from passes.errors import CalibrationError, FaspGraphError
from passes.verify import fresh_inputs

from .huggingface import MANIFEST, load

EXAMPLE = (
    3,
    11,
)  # batch and length of example tokens: odd and distinct, so that axes cannot be confused


@dataclass(frozen=True)
class Target:
    """A model to work on. `calibration`: batches like `inputs`; `heldout`: [N, length] or None."""

    name: str
    model: nn.Module
    inputs: Any
    calibration: list[Any] = field(default_factory=list)
    heldout: Tensor | None = None
    tokenizer: Any = None


def load_target(
    text: str, calibration: Path | None = None, length: int = 256, count: int = 64
) -> Target:
    """The target that `text` names; `calibration` is a text file for models with a tokenizer."""
    if text.startswith("zoo:"):
        target = _zoo(text.removeprefix("zoo:"))
    elif Path(text).is_dir():
        target = _transformers(text)
    elif ":" in text and "/" not in text:
        target = _factory(text)
    else:
        target = _transformers(text)
    if calibration is None:
        return target
    if target.tokenizer is None:
        raise CalibrationError(
            f"{text} has no tokenizer, so a text file cannot calibrate it · help: use "
            "package.module:factory"
        )
    batches = text_batches(calibration, target.tokenizer, length, count)
    return replace(target, calibration=[_like(target.inputs, batch) for batch in batches])


def text_batches(
    path: str | os.PathLike[str], tokenizer: Any, length: int, count: int, batch: int = 8
) -> list[Tensor]:
    """Up to `count` windows of `length` tokens of a text file, in batches [<= batch, length]."""
    windows = text_windows(path, tokenizer, length, count)
    return list(windows.split(batch))


def text_windows(
    path: str | os.PathLike[str], tokenizer: Any, length: int, count: int | None = None
) -> Tensor:
    """[N, length] windows of the tokens of a text file; at most `count`, spread evenly over it."""
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from error
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    total = len(ids) // length
    if not total:
        raise CalibrationError(
            f"{path} has {len(ids)} tokens, fewer than one window of {length} · help: give a "
            "longer text"
        )
    rows = torch.tensor(ids[: total * length]).view(total, length)
    if count is None or count >= total:
        return rows
    return rows[torch.linspace(0, total - 1, count).round().long()].clone()


def _like(inputs: Any, tokens: Tensor) -> Any:
    """`tokens` in the form of the example inputs."""
    if isinstance(inputs, dict):
        filled = {"input_ids": tokens}
        if "attention_mask" in inputs:
            filled["attention_mask"] = torch.ones_like(tokens)
        constants = {k: v for k, v in inputs.items() if not isinstance(v, Tensor)}
        return {**constants, **filled}
    return (tokens,) if isinstance(inputs, (tuple, list)) else tokens


def _zoo(name: str) -> Target:
    if name not in models_zoo.names():
        raise FaspGraphError(
            f"no zoo model {name!r} · help: one of {', '.join(models_zoo.names())}"
        )
    entry = models_zoo.load(name)
    calibration = list(entry.calibration) or [
        fresh_inputs(entry.inputs, seed, precise=False) for seed in range(4)
    ]
    return Target(
        entry.name, entry.model, entry.inputs, calibration, entry.heldout, entry.tokenizer
    )


def _factory(text: str) -> Target:
    module, _, name = text.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FaspGraphError(f"cannot import {text}: {error}") from error
    result = factory()
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        raise FaspGraphError(
            f"{text} must return (model, inputs) or (model, inputs, calibration), not "
            f"{type(result).__name__}"
        )
    if not isinstance(result[0], nn.Module):
        raise FaspGraphError(f"{text} returned {type(result[0]).__name__}, not a torch.nn.Module")
    calibration = list(result[2]) if len(result) == 3 and result[2] is not None else []
    return Target(text, result[0].eval(), result[1], calibration)


def _transformers(text: str) -> Target:
    """A folder or a hub id, by the Auto classes; never with code from the repository."""
    import transformers

    local = Path(text).is_dir()
    pruned = local and (Path(text) / MANIFEST).is_file()
    model = load(text) if pruned else _auto_model(text, local)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(text, local_files_only=local)
    except Exception:  # a model without a tokenizer; each tokenizer class fails in its own way
        tokenizer = None
    return Target(Path(text).name if local else text, model, _example(model), tokenizer=tokenizer)


def _auto_model(text: str, local: bool) -> nn.Module:
    import transformers

    if local and not (Path(text) / "config.json").is_file():
        raise FaspGraphError(f"the folder {text} holds no config.json: it is no Hugging Face model")
    options = {"local_files_only": local, "trust_remote_code": False, "dtype": torch.float32}
    try:
        config = transformers.AutoConfig.from_pretrained(
            text, local_files_only=local, trust_remote_code=False
        )
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model: nn.Module = auto.from_pretrained(text, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise FaspGraphError(
            f"{text} is no folder here and the hub gave no model: {str(error).splitlines()[0]} · "
            "help: give a local "
            "folder, zoo:NAME or package.module:factory; a hub id needs the network"
            if not local
            else f"{text} cannot be loaded: {str(error).splitlines()[0]}"
        ) from error
    return model.eval()


def _example(model: nn.Module) -> Any:
    """Example inputs by the model's own main input name: tokens or an image."""
    config: Any = getattr(model, "config", None)
    main = getattr(model, "main_input_name", "input_ids")
    generator = torch.Generator().manual_seed(0)
    if main == "input_ids" and hasattr(config, "vocab_size"):
        return {"input_ids": torch.randint(0, config.vocab_size, EXAMPLE, generator=generator)}
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and size is not None:
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        channels = getattr(config, "num_channels", 3)
        return {"pixel_values": torch.randn(2, channels, height, width, generator=generator)}
    raise FaspGraphError(
        f"{type(model).__name__} takes {main}, for which no example can be made · help: use "
        "package.module:factory, a "
        "function that returns (model, inputs)"
    )
