"""What the command line prunes: a text -> model, example inputs, calibration, held-out tokens.

zoo:NAME                  a model of models_zoo
FOLDER                    a Hugging Face folder, or one that `save` wrote
package.module:factory    a function that returns (model, inputs) or (model, inputs, calibration)
FOLDER@package.module:factory
                          what `save` wrote of the factory's model: a class of the user's own, of
                          which a folder holds weights and sizes only
owner/name                a model of the Hugging Face hub
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import models_zoo
from passes.capture import as_args
from passes.errors import CalibrationError, ConfigError, FaspGraphError
from passes.verify import fresh_inputs

from .corpora import (
    factory,
    image_batches,
    image_files,
    is_factory,
    refuse_missing,
    text_of,
)
from .folders.huggingface import MANIFEST, load
from .folders.lazyfolder import open_folder, return_freed_memory
from .folders.manifest import checked_files, read_manifest
from .inputs import UNQUANTISED, quantised_by
from .jsontext import read_object

EXAMPLE = (
    3,
    11,
)  # batch and length of example tokens: odd and distinct, so that axes cannot be confused


@dataclass(frozen=True)
class Target:
    """A model to work on. `calibration`: batches like `inputs`; `heldout`: [N, length] or
    None. `pixels`: (mean, std) per channel that images are normalised by. `source`: the text that
    named it.
    """

    name: str
    model: nn.Module
    inputs: Any
    calibration: list[Any] = field(default_factory=list)
    heldout: Tensor | None = None
    tokenizer: Any = None
    pixels: tuple[Any, Any] = ((0.5,), (0.5,))
    source: str = ""


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
    place = device_of(device, stream)
    if stream:
        target = _streamed(text)
    elif text.startswith("zoo:"):
        target = _zoo(text.removeprefix("zoo:"))
    elif (named := folder_of(text))[1]:
        target = _own(*named)
    elif Path(text).is_dir():
        target = _transformers(text)
    elif is_factory(text):
        target = _factory(text)
    else:
        target = _transformers(text)
    target = replace(target, source=text)
    if calibration is not None:
        target = replace(
            target, calibration=calibration_batches(target, str(calibration), length, count)
        )
    if evaluation is not None:
        target = replace(target, heldout=heldout_tokens(target, str(evaluation), length, count))
    if place is None:
        return target
    model = target.model.to(place)
    return replace(target, model=model, inputs=like_on(target.inputs, place))


def device_of(text: str | None, stream: bool = False) -> torch.device | None:
    """The device that `text` names, tried with one number; under torchrun each process on a
    machine has its own GPU.
    """
    if text is None:
        return None
    if stream:
        raise ConfigError("--stream computes on the CPU · help: leave --device out")
    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        place = torch.empty(1, device=text).device
        torch.cuda.set_device(place) if place.type == "cuda" else None
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch built without a device says so with an AssertionError
        raise ConfigError(
            f"device {text!r} cannot be used: {str(error).splitlines()[0]} · help: cpu, or cuda "
            "with a torch built for it"
        ) from error
    if place.type == "meta":
        raise ConfigError("device 'meta' holds no numbers · help: cpu, cuda")
    return place


def like_on(inputs: Any, place: torch.device) -> Any:
    """`inputs` with their tensors on a device."""
    return pytree.tree_map(lambda v: v.to(place) if isinstance(v, Tensor) else v, inputs)


def folder_of(text: str) -> tuple[Path, str]:
    """(folder, factory) of a target's text; the factory is empty where none stands behind an @."""
    folder, _, build = text.rpartition("@")
    own = is_factory(build) and Path(folder, MANIFEST).is_file()
    return (Path(folder), build) if own else (Path(text), "")


def calibration_batches(target: Target, source: str, length: int, count: int) -> list[Any]:
    """Batches like the target's inputs, of a factory, a folder of images, or text."""
    if is_factory(source) and not Path(source).exists():
        return list(factory(source)())
    if files := image_files(source):
        return image_inputs(target, files[:count])
    refuse_missing(source)
    if target.tokenizer is None:
        raise CalibrationError(
            f"{target.name} has no tokenizer, so text cannot calibrate it{_absent(source)} · help: "
            "pass package.module:factory, a function that returns batches like the inputs"
        )
    windows = windows_of(text_of(source), target.tokenizer, length, count, source)
    return [like(target.inputs, batch) for batch in windows.split(8)]


def heldout_tokens(target: Target, source: str, length: int, count: int | None) -> Tensor:
    """[N, length] windows of the text that perplexity is measured on."""
    if is_factory(source) and not Path(source).exists():
        found = factory(source)()
        if not isinstance(found, Tensor) or found.dim() != 2:
            raise FaspGraphError(f"{source} must return tokens [windows, length]")
        return found
    refuse_missing(source)
    if target.tokenizer is None:
        raise FaspGraphError(
            f"{target.name} has no tokenizer, so it has no perplexity on text{_absent(source)} · "
            "help: pass package.module:factory, a function that returns tokens [windows, length]"
        )
    return windows_of(text_of(source, evaluation=True), target.tokenizer, length, count, source)


def _absent(source: str) -> str:
    return "" if Path(source).exists() else f"; nor is {source} a file or folder here"


def image_inputs(target: Target, files: list[Path]) -> list[Any]:
    """Image files as batches like the target's inputs."""
    held = list(target.inputs.values()) if isinstance(target.inputs, dict) else [target.inputs]
    example = next((v for v in as_args(held[0])[0] if isinstance(v, Tensor)), None)
    if example is None or example.dim() != 4:
        raise CalibrationError(f"{target.name} takes no images [batch, channels, height, width]")
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
    build = factory(text)
    try:
        result = build()
    except Exception as error:  # the user's code, which may fail in any way
        raise FaspGraphError(f"{text}() failed: {type(error).__name__}: {error}") from error
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        raise FaspGraphError(
            f"{text} must return (model, inputs) or (model, inputs, calibration), not "
            f"{type(result).__name__}"
        )
    if not isinstance(result[0], nn.Module):
        raise FaspGraphError(f"{text} returned {type(result[0]).__name__}, not a torch.nn.Module")
    calibration = list(result[2]) if len(result) == 3 and result[2] is not None else []
    return Target(text, result[0].eval(), result[1], calibration)


def _own(folder: Path, build: str) -> Target:
    """The pruned form, in `folder`, of the factory's model."""
    dense = _factory(build)
    return replace(dense, name=folder.name, model=load(folder, dense.model))


def _streamed(text: str) -> Target:
    if not Path(text).is_dir():
        raise FaspGraphError(
            f"--stream reads a folder, and {text} is none · help: download the model first "
            "(hf download OWNER/NAME --local-dir FOLDER)"
        )
    model = open_folder(text)
    return_freed_memory()
    return _with_tokenizer(text, model, True)


def _transformers(text: str) -> Target:
    """A folder or a hub id, by the Auto classes; never with code from the repository."""
    local = Path(text).is_dir()
    pruned = local and (Path(text) / MANIFEST).is_file()
    if pruned:
        checked_files(Path(text), read_manifest(Path(text))["settings"])  # the tokenizer's too
    return _with_tokenizer(text, load(text) if pruned else _auto_model(text, local), local)


def _with_tokenizer(text: str, model: nn.Module, local: bool) -> Target:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(text, local_files_only=local)
    except Exception:  # a model without a tokenizer; each tokenizer class fails in its own way
        tokenizer = None
    name, pixels = Path(text).name if local else text, _pixels(Path(text))
    return Target(name, model, _example(model), tokenizer=tokenizer, pixels=pixels)


def _pixels(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation per channel, as preprocessor_config.json says; else 0.5."""
    path = folder / "preprocessor_config.json"
    found = read_object(path) if path.is_file() else {}
    return tuple(found.get("image_mean") or (0.5,)), tuple(found.get("image_std") or (0.5,))


def _auto_model(text: str, local: bool) -> nn.Module:
    import transformers

    if local and not (Path(text) / "config.json").is_file():
        raise FaspGraphError(f"the folder {text} holds no config.json: it is no Hugging Face model")
    if not local and text.startswith((".", "/", "~")):
        raise FaspGraphError(f"no folder {text} · help: zoo:NAME, a folder, package.module:factory")
    options = {"local_files_only": local, "trust_remote_code": False, "dtype": torch.float32}
    config = None
    try:
        config = transformers.AutoConfig.from_pretrained(
            text, local_files_only=local, trust_remote_code=False
        )
        causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModel
        model: nn.Module = auto.from_pretrained(text, **options)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if method := quantised_by(config):
            raise FaspGraphError(
                f"{text} is quantised ({method}), and what reads such weights is not here: "
                f"{str(error).splitlines()[0]} · help: {UNQUANTISED}"
            ) from error
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
        ids = torch.randint(0, config.vocab_size, EXAMPLE, generator=generator)
        paired = getattr(config, "is_encoder_decoder", False)
        return {"input_ids": ids, **({"decoder_input_ids": ids.flip(1)} if paired else {})}
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
