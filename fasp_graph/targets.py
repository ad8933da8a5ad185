"""The models that a text names: a text -> a Target without data.

zoo:NAME                  a model of models_zoo
FOLDER                    a Hugging Face folder, or one that `save` wrote
package.module:factory    a function that returns (model, inputs) or (model, inputs, calibration)
FOLDER@package.module:factory
                          what `save` wrote of the factory's model: a class of the user's own, of
                          which a folder holds weights and sizes only
owner/name                a model of the Hugging Face hub
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import models_zoo
from passes.errors import FaspGraphError
from passes.fresh import fresh_inputs

from .corpora import factory, is_factory
from .folders.huggingface import MANIFEST, load
from .folders.lazyfolder import open_folder, return_freed_memory
from .folders.manifest import checked_files, read_manifest
from .inputs import UNQUANTISED, quantised_by
from .jsontext import read_object
from .network import offline_without_network

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


def model_of(text: str, stream: bool = False) -> Target:
    """The model that `text` names, its example inputs, and the data that come with it. `stream`: a
    folder whose weights are read one by one (fasp_graph/scale/streaming.py).
    """
    if stream:
        return _streamed(text)
    if text.startswith("zoo:"):
        return _zoo(text.removeprefix("zoo:"))
    if (named := folder_of(text))[1]:
        return _own(*named)
    if is_factory(text) and not Path(text).is_dir():
        return _factory(text)
    return _transformers(text)


def refuse_unrunnable(target: Target, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """FaspGraphError if the model fails on these inputs, which is its own fault or theirs."""
    try:
        with torch.no_grad():
            target.model(*args, **kwargs)
    except Exception as error:  # the user's code, which may fail in any way
        raise FaspGraphError(
            f"{target.name} fails on its example inputs: {type(error).__name__}: {error} · help: "
            "give inputs as the model is called with; --debug shows where"
        ) from error


def folder_of(text: str) -> tuple[Path, str]:
    """(folder, factory) of a target's text; the factory is empty where none stands behind an @."""
    folder, _, build = text.rpartition("@")
    own = is_factory(build) and Path(folder, MANIFEST).is_file()
    return (Path(folder), build) if own else (Path(text), "")


def _function_in(path: Path) -> str:
    """The way to name a model that a file of Python builds."""
    return f", or {path.stem}:FUNCTION that returns (model, inputs)" if path.suffix == ".py" else ""


def _zoo(name: str) -> Target:
    if name not in (known := models_zoo.names()):
        near = difflib.get_close_matches(name, known, 5, 0.4) or known[:5]
        raise FaspGraphError(
            f"no zoo model {name!r} · help: {', '.join(near)}; `fasp-graph zoo` lists all"
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
        raise FaspGraphError(
            f"{text}() failed: {type(error).__name__}: {error} · help: mend the function; --debug "
            "shows where"
        ) from error
    if not isinstance(result, (tuple, list)) or len(result) not in (2, 3):
        raise FaspGraphError(
            f"{text} returned {type(result).__name__} · help: return (model, inputs) or (model, "
            "inputs, calibration)"
        )
    if not isinstance(result[0], nn.Module):
        raise FaspGraphError(
            f"{text} returned {type(result[0]).__name__} where the model stands · help: return a "
            "torch.nn.Module first"
        )
    batches = result[2] if len(result) == 3 and result[2] is not None else []
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Tensor, Mapping)):
        raise FaspGraphError(
            f"{text} returned {type(batches).__name__} where the calibration stands · help: return "
            "(model, inputs, a list of batches like the inputs)"
        )
    return Target(text, result[0].eval(), result[1], list(batches))


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
    return Target(name, model, example_inputs(model), tokenizer=tokenizer, pixels=pixels)


def _pixels(folder: Path) -> tuple[Any, Any]:
    """Mean and deviation per channel, as preprocessor_config.json says; else 0.5."""
    path = folder / "preprocessor_config.json"
    found = read_object(path) if path.is_file() else {}
    return tuple(found.get("image_mean") or (0.5,)), tuple(found.get("image_std") or (0.5,))


def _auto_model(text: str, local: bool) -> nn.Module:
    import transformers

    from .scale.skeleton import class_of

    if local and not (Path(text) / "config.json").is_file():
        raise FaspGraphError(
            f"the folder {text} holds no config.json: it is no Hugging Face model · help: name the "
            "folder that does, or package.module:factory"
        )
    if not local and text.startswith((".", "/", "~")):
        raise FaspGraphError(f"no folder {text} · help: zoo:NAME, a folder, package.module:factory")
    if Path(text).is_file():
        raise FaspGraphError(
            f"{text} is a file, not the folder of a model · help: name the folder that holds its "
            f"config.json{_function_in(Path(text))}"
        )
    if not local:
        offline_without_network()
    options = {"local_files_only": local, "trust_remote_code": False, "dtype": torch.float32}
    config = None
    try:
        config = transformers.AutoConfig.from_pretrained(
            text, local_files_only=local, trust_remote_code=False
        )
        model: nn.Module = class_of(config).from_pretrained(text, **options)
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
            else f"{text} cannot be loaded: {str(error).splitlines()[0]} · help: save it again, or "
            "name package.module:factory"
        ) from error
    return model.eval()


def example_inputs(model: nn.Module) -> Any:
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
        "package.module:factory, a function that returns (model, inputs); in Python, export takes "
        "inputs="
    )
