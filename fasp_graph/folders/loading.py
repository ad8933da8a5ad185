"""load: the pruned model in a folder, without running anything that the folder brings."""

from __future__ import annotations

import copy
import inspect
import operator
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from passes.errors import FaspGraphError, brief

from ..emit.emission import apply_shapes
from ..emit.sizes import replaces
from ..jsontext import read_object
from .manifest import AGAIN, MANIFEST, checked_files, read_manifest
from .origin import Loaded, remember

_READ = ("config.json", "generation_config.json")
_ATTENTION = ("eager", "sdpa")
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_MISFITS = (
    *(RuntimeError, LookupError, TypeError, ValueError, AttributeError, OSError),
    ArithmeticError,
)


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The pruned model in a folder that `save` wrote, in eval mode on the CPU.

    A transformers model is built from its configuration. Any other needs `model`, a fresh dense
    instance, which is copied.
    """
    root = Path(folder)
    manifest = read_manifest(root)
    paths = checked_files(root, manifest["weights"])
    built = copy.deepcopy(model) if model is not None else _build(root, manifest)
    try:
        state: dict[str, Tensor] = {}
        for path in paths:
            state |= safetensors.torch.load_file(path)
        for alias, name in manifest["aliases"].items():
            state[alias] = state[name]
        _check_emission(built, manifest["emission"], state)
        built = apply_shapes(built, manifest["emission"])
        built.load_state_dict(state, strict=True, assign=True)
        _tie(built, manifest["aliases"])
    except FaspGraphError:
        raise
    except _MISFITS as error:
        raise FaspGraphError(
            f"the weights in {root} do not fit {type(built).__name__}: {brief(error, 500)} · help: "
            "give the dense model that was pruned, and the version of its code"
        ) from error
    except safetensors.SafetensorError as error:
        raise FaspGraphError(
            f"{root} holds a broken safetensors file: {error} · {AGAIN}"
        ) from error
    return remember(built.eval(), Loaded(Path(os.path.abspath(root)), manifest))


def _build(root: Path, manifest: dict[str, Any]) -> nn.Module:
    """A dense transformers model with random weights, of the folder's class and configuration."""
    name = manifest.get("class")
    if name is None:
        raise FaspGraphError(
            f"{root} holds a model of the user's own class · help: load(folder, model=a fresh "
            f"dense instance); on the command line {root.name}@package.module:factory, a function "
            "that returns (model, inputs)"
        )
    import transformers

    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(known) or not issubclass(known, transformers.PreTrainedModel):
        raise FaspGraphError(
            f"{name!r} is not a model class of the installed transformers "
            f"{transformers.__version__} · help: install the version that the folder was written "
            "with"
        )
    found: Any = known
    if not (root / "config.json").is_file() or found.config_class is None:
        raise FaspGraphError(f"{root} holds no config.json for {name} · {AGAIN}")
    settings = manifest["settings"]
    checked_files(root, {file: settings[file] for file in _READ if file in settings})
    try:
        config = _config(root, found.config_class)
        if manifest.get("attention") in _ATTENTION:
            config._attn_implementation = manifest["attention"]
        if manifest.get("experts") in _EXPERTS:  # each asks its own of the experts' sizes
            config._experts_implementation = manifest["experts"]
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            model: nn.Module = found(config)
        if (root / "generation_config.json").is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(root)
    except FaspGraphError:
        raise
    except Exception as error:  # each class checks its configuration in its own way, or not at all
        raise FaspGraphError(
            f"the configuration in {root} makes no {name}: {type(error).__name__}: "
            f"{brief(error, 300)} · help: install the transformers that wrote the folder, or fetch "
            "it again"
        ) from error
    return model


def _config(root: Path, kind: Any) -> Any:
    """The dense configuration: config.json itself, or what it holds for a folder of ours."""
    held = read_object(root / "config.json")
    dense = held.get("dense") if held.get("model_type") == "fasp_graph" else None
    return kind.from_dict(_floats(dense)) if isinstance(dense, dict) else kind.from_pretrained(root)


def _floats(held: Any) -> Any:
    """Numbers that JSON lacks, which transformers writes as {"__float__": "Infinity"}."""
    if isinstance(held, dict):
        text = held.get("__float__")
        plain = {name: _floats(value) for name, value in held.items()}
        return float(text) if isinstance(text, str) and len(held) == 1 else plain
    return [_floats(value) for value in held] if isinstance(held, list) else held


def _check_emission(model: nn.Module, emission: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A manifest may only make a dense model smaller: sizes shrink, integers replace integers."""
    held = dict([*model.named_parameters(), *model.named_buffers()])
    for name, shape in emission["shapes"].items():
        old = operator.attrgetter(name)(model).shape
        stored = name if name not in emission["padded"] else original_name(name)
        fits = len(shape) == len(old) and all(0 < n <= m for n, m in zip(shape, old, strict=True))
        if not fits or (stored in state and list(state[stored].shape) != list(shape)):
            raise FaspGraphError(
                f"{MANIFEST}: shape {shape} of {name} is not that of the weights · {AGAIN}"
            )
    for path, sizes in emission["attributes"].items():
        for name, size in sizes.items():
            if not replaces(size, getattr(model.get_submodule(path), name, None)):
                raise FaspGraphError(
                    f"{MANIFEST}: {path}.{name} is no integer of the model · {AGAIN}"
                )
    widest = max((max(tensor.shape, default=1) for tensor in held.values()), default=1)
    axes = [(p, axis) for table in ("scatter", "gather") for p, axis in emission[table].items()]
    axes += [(p, axis) for p, held_axes in emission["padded"].items() for axis in held_axes]
    for path, (_, size, kept) in axes:
        if not 0 < size <= widest or not all(0 <= index < size for index in kept):
            raise FaspGraphError(f"{MANIFEST}: positions of {path} are out of range · {AGAIN}")


def original_name(name: str) -> str:
    """The state-dict name under which a parametrised weight is stored."""
    path, _, leaf = name.rpartition(".")
    return ".".join(part for part in (path, "parametrizations", leaf, "original") if part)


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Every alias becomes the very parameter or buffer that it names."""
    for alias, name in aliases.items():
        holder, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(holder), leaf)
        holder, _, leaf = alias.rpartition(".")
        owner = model.get_submodule(holder)
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = tensor
