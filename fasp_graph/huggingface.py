"""A pruned model as a folder in Hugging Face form.

    model.safetensors    every storage once; tied names are recorded as aliases
    config.json, ...     the user's configuration, generation configuration, tokenizer
    fasp_graph.json      format, plan, new shapes of the modules, versions, sha256 of the weights
    README.md            a model card

Nothing in a folder is executed: no pickle, no code, no class but those of the installed
transformers. A folder appears complete or not at all.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import operator
import os
import platform
import re
import shutil
import uuid
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from passes.errors import FaspGraphError

from .card import model_card
from .jsontext import to_json
from .modules import apply_shapes

if TYPE_CHECKING:
    from .prune import Pruned

FORMAT = 1
MANIFEST, WEIGHTS = "fasp_graph.json", "model.safetensors"
_PACKAGES = ("fasp-graph", "torch", "transformers", "safetensors")
_ATTENTION = ("eager", "sdpa")


# ------------------------------------------------------------------------------------------ save
def save(pruned: Pruned, folder: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Write `pruned` as a folder and return its path.

    An existing target is refused unless it is an earlier folder of this kind; that one is replaced
    after the new one is complete. `tokenizer` is anything with `save_pretrained`.
    """
    if "graph" in pruned.emission.ways.values():
        raise FaspGraphError(
            "this model could only be made smaller as a graph, which a "
            "folder cannot hold · help: use export_onnx, or torch.export.save of graph_module"
        )
    target = Path(os.path.abspath(folder))
    _refuse_foreign(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        _write(pruned, draft, tokenizer)
        for path in (*draft.rglob("*"), draft):
            _flush(path)
        _swap(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _write(pruned: Pruned, folder: Path, tokenizer: Any) -> None:
    model = pruned.model
    state, aliases = unique_state(model)
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    os.chmod(folder / WEIGHTS, 0o666 & ~_umask())
    for owner in (getattr(model, "config", None), getattr(model, "generation_config", None)):
        if owner is not None and hasattr(owner, "save_pretrained"):
            owner.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    report = pruned.report.to_dict()
    (folder / "README.md").write_text(model_card(type(model).__name__, report), encoding="utf-8")
    manifest = {
        "format": FORMAT,
        "class": type(model).__name__ if _is_transformers(model) else None,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "weights": {"file": WEIGHTS, "sha256": _digest(folder / WEIGHTS)},
        "aliases": aliases,
        "emission": pruned.emission.to_dict(),
        "plan": pruned.plan.to_dict(),
        "report": report,
        "versions": {"python": platform.python_version(), **_versions()},
        "files": sorted({*(path.name for path in folder.iterdir()), MANIFEST}),
    }
    (folder / MANIFEST).write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")


def unique_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once, and left-out name -> the name holding its tensor."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state, aliases


def _refuse_foreign(target: Path) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise FaspGraphError(f"{target} exists and is no fasp_graph folder · help: choose another")
    known = _manifest(target).get("files", [])
    foreign = sorted(path.name for path in target.iterdir() if path.name not in known)
    if foreign:
        raise FaspGraphError(
            f"{target} also holds {foreign[0]}, which would be lost · help: move it away, or "
            "choose another folder"
        )


def _swap(draft: Path, target: Path) -> None:
    """`draft` becomes `target`; an old target goes only after that, and comes back if it fails."""
    old = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    _flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------ load
def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The pruned model in a folder that `save` wrote, in eval mode on the CPU.

    A transformers model is built from its configuration. Any other needs `model`, a fresh dense
    instance, which is copied.
    """
    root = Path(folder)
    manifest = _manifest(root)
    path = _weights(root, manifest)
    built = copy.deepcopy(model) if model is not None else _build(root, manifest)
    try:
        state: dict[str, Tensor] = safetensors.torch.load_file(path)
        for alias, name in manifest["aliases"].items():
            state[alias] = state[name]
        _check_emission(built, manifest["emission"], state)
        built = apply_shapes(built, manifest["emission"])
        built.load_state_dict(state, strict=True, assign=True)
        _tie(built, manifest["aliases"])
    except FaspGraphError:
        raise
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError, OSError) as error:
        raise FaspGraphError(
            f"the weights in {root} do not fit {type(built).__name__}: {str(error)[:500]}"
        ) from error
    except safetensors.SafetensorError as error:
        raise FaspGraphError(f"{path} is not a safetensors file: {error}") from error
    return built.eval()


def _manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise FaspGraphError(f"{root} holds no {MANIFEST} · help: give a folder written by save")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FaspGraphError(f"{path} is not JSON: {error}") from error
    version = manifest.get("format") if isinstance(manifest, dict) else None
    if version != FORMAT:
        raise FaspGraphError(
            f"{path} has format {version!r}; this version reads {FORMAT} · help: update fasp-graph"
        )
    wanted = {"weights": dict, "aliases": dict, "emission": dict, "files": list}
    for key, kind in wanted.items():
        if not isinstance(manifest.get(key), kind):
            raise FaspGraphError(f"{path} is damaged: {key!r} is missing or of the wrong type")
    return dict(manifest)


def _weights(root: Path, manifest: dict[str, Any]) -> Path:
    """Path of the weights; their hash has been checked."""
    name, expected = manifest["weights"].get("file"), manifest["weights"].get("sha256")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*", name):
        raise FaspGraphError(f"{root / MANIFEST}: {name!r} is not a plain file name")
    path = root / name
    if not path.is_file():
        raise FaspGraphError(f"{path} is missing")
    if _digest(path) != expected:
        raise FaspGraphError(f"{path} is not the file that was saved: its sha256 differs")
    return path


def _build(root: Path, manifest: dict[str, Any]) -> nn.Module:
    """A dense transformers model with random weights, of the folder's class and configuration."""
    name = manifest.get("class")
    if name is None:
        raise FaspGraphError(
            f"{root} holds a model of the user's own class · help: load(folder, model=a fresh "
            "dense instance)"
        )
    import transformers

    known = getattr(transformers, name, None) if isinstance(name, str) else None
    if not inspect.isclass(known) or not issubclass(known, transformers.PreTrainedModel):
        raise FaspGraphError(
            f"{name!r} is not a model class of the installed transformers "
            f"{transformers.__version__}"
        )
    found: Any = known
    if not (root / "config.json").is_file() or found.config_class is None:
        raise FaspGraphError(f"{root} holds no config.json for {name}")
    config = found.config_class.from_pretrained(root)
    if manifest.get("attention") in _ATTENTION:
        config._attn_implementation = manifest["attention"]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model: nn.Module = found(config)
    if (root / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(root)
    return model


def _check_emission(model: nn.Module, emission: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A manifest may only make a dense model smaller: sizes shrink, integers replace integers."""
    held = dict([*model.named_parameters(), *model.named_buffers()])
    for name, shape in emission["shapes"].items():
        old = operator.attrgetter(name)(model).shape
        fits = len(shape) == len(old) and all(0 < n <= m for n, m in zip(shape, old, strict=True))
        if not fits or (name in state and list(state[name].shape) != list(shape)):
            raise FaspGraphError(f"{MANIFEST}: shape {shape} of {name} is not that of the weights")
    for path, sizes in emission["attributes"].items():
        for name in sizes:
            if type(getattr(model.get_submodule(path), name, None)) is not int:
                raise FaspGraphError(f"{MANIFEST}: {path}.{name} is no integer of the model")
    widest = max((max(tensor.shape, default=1) for tensor in held.values()), default=1)
    for table in ("scatter", "gather"):
        for path, (_, size, kept) in emission[table].items():
            if not 0 < size <= widest or not all(0 <= index < size for index in kept):
                raise FaspGraphError(f"{MANIFEST}: positions of {path} are out of range")


def _tie(model: nn.Module, aliases: dict[str, str]) -> None:
    """Every alias becomes the very parameter or buffer that it names."""
    for alias, name in aliases.items():
        holder, _, leaf = name.rpartition(".")
        tensor = getattr(model.get_submodule(holder), leaf)
        holder, _, leaf = alias.rpartition(".")
        owner = model.get_submodule(holder)
        table = owner._parameters if leaf in owner._parameters else owner._buffers
        table[leaf] = tensor


def _is_transformers(model: nn.Module) -> bool:
    import transformers

    known = getattr(transformers, type(model).__name__, None) is type(model)
    return known and isinstance(model, transformers.PreTrainedModel)


def _umask() -> int:
    """The process's umask: safetensors writes files that only their owner may read."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
