"""A pruned model as a folder in Hugging Face form.

    model.safetensors    every storage once, in shards above a size; tied names are aliases
    config.json, ...     configuration, generation configuration, tokenizer or processor
    fasp_graph.json      format, plan, new shapes of the modules, versions, sha256 of all above
    README.md            a model card

If the class's configuration can say the pruned shapes, config.json says them, and plain
`AutoModel*.from_pretrained` loads the folder. Else config.json has the model type fasp_graph and
holds the dense configuration: `AutoModel*.from_pretrained` loads it after `import fasp_graph`.
Nothing in a folder is executed: no pickle, no code, no class but those of the installed
transformers. A folder appears complete or not at all.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
from torch import Tensor, nn

from passes.errors import FaspGraphError
from passes.lazy import Lazy

from ..emit.emission import Emission
from ..jsontext import to_json
from .card import fact_lines, model_card
from .companions import NAMES, copy_companions
from .loading import load
from .manifest import FORMAT, MANIFEST, checked_files, digest, read_manifest, versions
from .origin import Loaded, Pruning, origin_of
from .settings import is_transformers, refuse_undersized, said_config, write_config
from .shards import INDEX, stored, write_shard
from .whole import whole

if TYPE_CHECKING:
    from ..prune import Pruned

__all__ = ["MANIFEST", "load", "push_to_hub", "save", "unique_state"]

_MEASURED = ("seconds", "peak_memory", "peak_memory_cuda")  # what differs from run to run
State = Mapping[str, Tensor]


def save(
    pruned: Pruned | nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    facts: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write `pruned`, or a model that `load` or `recover` returned, as a folder; its path.

    An existing target is refused unless it is an earlier folder of this kind; that one is replaced
    after the new one is complete. `tokenizer` is anything with `save_pretrained` (a processor
    too); what it does not write is copied from the local folder that the model came from. `facts`
    are lines of the model card, such as {"calibration data": "WikiText-2", "perplexity before":
    45.8, "perplexity after": 52.1}. `extra` writes more files into the folder
    before it appears.
    """
    if isinstance(pruned, nn.Module) or not hasattr(pruned, "emission"):
        model, origin = pruned, origin_of(pruned)
    else:
        model, origin = pruned.model, Pruning.of(pruned)
    _refuse(model, origin)
    with _draft(folder) as draft:
        _fill(model, origin, draft, max_shard_size, None, tokenizer, facts or {}, extra)
    return Path(os.path.abspath(folder))


def save_into(
    model: nn.Module,
    origin: Pruning | Loaded,
    folder: Path,
    state: State | None,
    max_shard_size: int | str,
) -> None:
    """What `save` writes, but for tokenizer or processor, into a folder that may hold other files:
    those of the same names are replaced, and weights that were there go.
    """
    _refuse(model, origin)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder) as made:
        draft = Path(made)
        _fill(model, origin, draft, max_shard_size, state, companions=False)
        weights = (MANIFEST, INDEX, "model.safetensors", "model-*-of-*.safetensors")
        for old in itertools.chain(*(folder.glob(name) for name in weights)):
            old.unlink()
        for path in sorted(draft.iterdir(), key=lambda path: path.name == MANIFEST):
            os.replace(path, folder / path.name)


def _refuse(model: nn.Module, origin: Pruning | Loaded) -> None:
    if isinstance(origin, Loaded):
        return
    if "graph" in origin.emission.ways.values():
        raise FaspGraphError(
            "this model could only be made smaller as a graph, which a "
            "folder cannot hold · help: use export_onnx, or torch.export.save of graph_module"
        )
    refuse_undersized(model, origin.parameters)


@contextmanager
def _draft(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder that becomes `folder` when all went well."""
    target = Path(os.path.abspath(folder))
    refuse_foreign(target)
    with whole(target.resolve()) as draft:
        yield draft


def push_to_hub(folder: str | os.PathLike[str], repo_id: str, private: bool = True) -> str:
    """Upload a folder that `save` wrote and return its address; the token is huggingface_hub's."""
    root = Path(folder)
    files = read_manifest(root)["files"]
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    info = api.upload_folder(repo_id=repo_id, folder_path=root, allow_patterns=files)
    return str(info)


def _fill(
    model: Any,
    origin: Pruning | Loaded,
    folder: Path,
    max_shard_size: int | str,
    state: State | None = None,
    tokenizer: Any = None,
    facts: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
    companions: bool = True,
) -> None:
    """Write all files, the manifest last. `state`: the weights, where `model` does not hold them
    all. Without `companions`, tokenizer and processor are not looked for.
    """
    held, aliases = unique_state(model, state)
    said = said_config(model, origin)
    told = _told(model, origin, said is not None)
    if isinstance(origin, Loaded):
        _refuse_others(held, aliases, origin)
    weights = _write_weights(held, folder, max_shard_size)
    write_config(model, said, folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if companions:
        _copy_companions(model, origin, folder)
    settings = _settings(folder, {*weights, INDEX})
    _write_card(model, origin, folder, said, facts or {})
    if extra is not None:
        extra(folder)
    manifest = {
        **told,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "experts": getattr(getattr(model, "config", None), "_experts_implementation", None),
        "weights": weights,
        "settings": settings,
        "aliases": aliases,
        "versions": versions(),
        "files": sorted({*(path.name for path in folder.iterdir()), MANIFEST}),
    }
    (folder / MANIFEST).write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")


def _told(model: nn.Module, origin: Pruning | Loaded, plain: bool) -> dict[str, Any]:
    """What the manifest says of the pruning."""
    if isinstance(origin, Loaded):
        return origin.again()
    report = origin.report.to_dict()
    return {
        "format": FORMAT,
        "class": type(model).__name__ if is_transformers(model) else None,
        "plain": plain,
        "emission": (Emission(ways=origin.emission.ways) if plain else origin.emission).to_dict(),
        "config": asdict(origin.config),
        "plan": origin.plan.to_dict(),
        "report": {key: held for key, held in report.items() if key not in _MEASURED},
    }


def _refuse_others(held: State, aliases: Mapping[str, str], origin: Loaded) -> None:
    """FaspGraphError if the weights are not those, by name, shape and tie, of the folder."""
    root = origin.folder
    if aliases != origin.manifest["aliases"]:
        raise FaspGraphError(f"the model ties other weights than {root} · help: load it again")
    stored_there = (stored(root / name) for name in origin.manifest["weights"])
    shapes = {name: held.shape for part in stored_there for name, held in part.items()}
    for name in sorted({*shapes, *held}):
        if name not in held or tuple(held[name].shape) != shapes.get(name):
            raise FaspGraphError(
                f"{name} is not what the model had in {root} · help: load it again; what PEFT "
                "added, merge_and_unload() merges"
            )


def _copy_companions(model: nn.Module, origin: Pruning | Loaded, folder: Path) -> None:
    """Tokenizer and processor from where the model came from; what has a hash is checked."""
    if isinstance(origin, Pruning):
        copy_companions(getattr(model, "name_or_path", None), folder)
        return
    before = {path.name for path in folder.iterdir()}
    copy_companions(str(origin.folder), folder)
    copied = {path.name for path in folder.iterdir()} - before
    hashes = origin.manifest["settings"]
    checked_files(folder, {name: hashes[name] for name in copied if name in hashes})


def _write_card(
    model: nn.Module,
    origin: Pruning | Loaded,
    folder: Path,
    said: Any,
    facts: Mapping[str, Any],
) -> None:
    """README.md; of a model that was loaded the card and pages that were there, and the facts."""
    path = folder / "README.md"
    if isinstance(origin, Pruning):
        card = model_card(model, origin, facts, said is not None)
    else:
        left = {*origin.manifest["files"], path.name} - {*origin.manifest["weights"], INDEX}
        for name in left - {MANIFEST, *origin.manifest["settings"], *NAMES}:
            if (origin.folder / name).is_file() and not (folder / name).exists():
                shutil.copyfile(origin.folder / name, folder / name)
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
        card += "\n" * bool(facts) + fact_lines(facts)
    path.write_text(card, encoding="utf-8")


def _settings(folder: Path, without: set[str]) -> dict[str, str]:
    """File name -> sha256 of the configuration, tokenizer and processor: what is not weights."""
    held = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: digest(path) for path in held if path.name not in without}


def _write_weights(
    state: Mapping[str, Tensor], folder: Path, max_shard_size: int | str
) -> dict[str, str]:
    """Write the weights in the hub's form and return file name -> sha256."""
    split = huggingface_hub.split_state_dict_into_shards_factory(
        dict(state),
        get_storage_id=id,  # `unique_state` left every storage once
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for name, keys in split.filename_to_tensors.items():
        write_shard(folder / name, {key: state[key] for key in keys}, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(to_json(index, indent=1) + "\n", encoding="utf-8")
    return {name: digest(folder / name) for name in sorted(split.filename_to_tensors)}


def unique_state(
    model: nn.Module, given: State | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once, and left-out name -> the name holding its tensor."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in (model.state_dict() if given is None else given).items():
        held = id(tensor.read) if isinstance(tensor, Lazy) else tensor.data_ptr()
        key = (held, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state, aliases


def refuse_foreign(target: Path) -> None:
    """FaspGraphError if something is at `target` that no earlier `save` wrote."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / MANIFEST).is_file():
        raise FaspGraphError(f"{target} exists and is no fasp_graph folder · help: choose another")
    known = read_manifest(target).get("files", [])
    foreign = sorted(path.name for path in target.iterdir() if path.name not in known)
    if foreign:
        raise FaspGraphError(
            f"{target} also holds {foreign[0]}, which would be lost · help: move it away, or "
            "choose another folder"
        )
