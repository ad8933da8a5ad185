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

import copy
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
from torch import Tensor, nn

from passes.compare import outputs
from passes.errors import FaspGraphError
from passes.lazy import Lazy
from passes.skeleton import skeleton

from ..emit.emission import Emission
from ..emit.layout import plain_config
from ..jsontext import to_json
from .card import model_card
from .companions import copy_companions
from .loading import load
from .manifest import FORMAT, MANIFEST, digest, read_manifest, versions
from .shards import INDEX, write_shard
from .whole import whole

if TYPE_CHECKING:
    from ..prune import Pruned

__all__ = ["MANIFEST", "load", "push_to_hub", "resave", "save", "unique_state"]

_MEASURED = ("seconds", "peak_memory", "peak_memory_cuda")  # what differs from run to run
PLAIN = ("native", "attributes")  # ways that a class built from another configuration can repeat


def save(
    pruned: Pruned,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    facts: Mapping[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write `pruned` as a folder and return its path.

    An existing target is refused unless it is an earlier folder of this kind; that one is replaced
    after the new one is complete. `tokenizer` is anything with `save_pretrained` (a processor
    too); what it does not write is copied from the local folder that the model came from. `facts`
    are lines of the model card, such as {"calibration data": "WikiText-2", "perplexity before":
    45.8, "perplexity after": 52.1}. `extra` writes more files into the folder
    before it appears.
    """
    if "graph" in pruned.emission.ways.values():
        raise FaspGraphError(
            "this model could only be made smaller as a graph, which a "
            "folder cannot hold · help: use export_onnx, or torch.export.save of graph_module"
        )
    refuse_undersized(pruned.model, pruned.deps.parameters)
    with _draft(folder) as draft:
        _write(pruned, draft, tokenizer, max_shard_size, facts or {}, extra)
    return Path(os.path.abspath(folder))


def resave(
    source: str | os.PathLike[str], model: nn.Module, folder: str | os.PathLike[str]
) -> Path:
    """Write the folder `source` again as `folder`, with the weights of `model`, which `load` made
    of it and which was trained since. Returns the new folder's path.
    """
    root = Path(source)
    manifest = read_manifest(root)
    state, aliases = unique_state(model)
    if aliases != manifest["aliases"]:
        raise FaspGraphError(f"the model ties other weights than {root} · help: load it again")
    weights, left = manifest["weights"], set(manifest["files"])
    with _draft(folder) as draft:
        for name in left - set(weights) - {MANIFEST, INDEX}:
            shutil.copyfile(root / name, draft / name)
        size = max((root / name).stat().st_size for name in weights)
        manifest["weights"] = _write_weights(state, draft, 2 * size)
        manifest["files"] = sorted({*(path.name for path in draft.iterdir()), MANIFEST})
        (draft / MANIFEST).write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")
    return Path(os.path.abspath(folder))


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


def _write(
    pruned: Pruned,
    folder: Path,
    tokenizer: Any,
    max_shard_size: int | str,
    facts: Mapping[str, Any],
    extra: Callable[[Path], None] | None,
) -> None:
    model = pruned.model
    state, aliases = unique_state(model)
    weights = _write_weights(state, folder, max_shard_size)
    plain = _write_config(pruned, folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_companions(model, folder)
    settings = _settings(folder, {*weights, INDEX})
    report = pruned.report.to_dict()
    card = model_card(type(model).__name__, report, facts, plain, pruned.emission)
    (folder / "README.md").write_text(card, encoding="utf-8")
    if extra is not None:
        extra(folder)
    manifest = {
        "format": FORMAT,
        "class": type(model).__name__ if _is_transformers(model) else None,
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "experts": getattr(getattr(model, "config", None), "_experts_implementation", None),
        "plain": plain,
        "weights": weights,
        "settings": settings,
        "aliases": aliases,
        "emission": (Emission(ways=pruned.emission.ways) if plain else pruned.emission).to_dict(),
        "config": asdict(pruned.config),
        "plan": pruned.plan.to_dict(),
        "report": {key: held for key, held in report.items() if key not in _MEASURED},
        "versions": versions(),
        "files": sorted({*(path.name for path in folder.iterdir()), MANIFEST}),
    }
    (folder / MANIFEST).write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")


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


def _write_config(pruned: Pruned, folder: Path) -> bool:
    """Write config.json; True if it says the pruned shapes, so that a plain load works."""
    model: Any = pruned.model
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return False
    if not _is_transformers(model):
        config.save_pretrained(folder)
        return False
    said = _said(pruned)
    if said is None:
        from .auto import FaspConfig

        dense = {**config.to_dict(), "architectures": [type(model).__name__]}
        dense.pop("_name_or_path", None)  # where the dense model lay on this machine
        FaspConfig(dense=dense, architectures=["FaspModel"]).save_pretrained(folder)
        return False
    said.architectures = [type(model).__name__]
    said.save_pretrained(folder)
    return True


def _said(pruned: Pruned) -> Any:
    """The configuration that says the pruned shapes, if one does and its numbers are the same."""
    if not set(pruned.emission.ways.values()) <= set(PLAIN):
        return None
    model: Any = pruned.model
    changes = {
        (g.size // g.blocks, len(pruned.plan.kept[g.name]) // g.blocks) for g in _cut(pruned)
    }
    changes |= {(g.size, len(pruned.plan.kept[g.name])) for g in _cut(pruned)}
    said = plain_config(model, sorted(changes))
    if said is None:
        return None
    with torch.random.fork_rng(devices=[]):
        other = skeleton(lambda: type(model)(said)).to(next(model.parameters()).dtype).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    args, training = pruned.inputs, model.training
    same = zip(outputs(model.eval(), args), outputs(other, args), strict=False)
    agrees = all(a.shape == b.shape and torch.allclose(a, b, 0, 1e-6) for a, b in same)
    model.train(training)
    return said if agrees else None


def _cut(pruned: Pruned) -> list[Any]:
    return [g for g in pruned.deps.groups if g.name in pruned.plan.kept]


def unique_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict with every tensor once, and left-out name -> the name holding its tensor."""
    state: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        held = id(tensor.read) if isinstance(tensor, Lazy) else tensor.data_ptr()
        key = (held, tensor.dtype, tensor.device, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            state[name] = tensor.detach().cpu().contiguous().clone()
    return state, aliases


def refuse_undersized(model: Any, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """FaspGraphError if the model, of these shapes before it is pruned, is not what its
    configuration builds: a folder says how to make that smaller.
    """
    if not _is_transformers(model):
        return
    built = skeleton(lambda: type(model)(copy.deepcopy(model.config)))
    shapes = {name: tuple(p.shape) for name, p in built.named_parameters(remove_duplicate=False)}
    for name, shape in parameters.items():
        if shapes.get(name) != tuple(shape):
            raise FaspGraphError(
                f"{name} {list(shape)} was not what the configuration of {type(model).__name__} "
                f"builds ({list(shapes.get(name, ()))}) before it was pruned here, so a folder "
                "cannot say how to build it · help: prune the original model once, by as much as "
                "both times together; or export it"
            )


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


def _is_transformers(model: nn.Module) -> bool:
    import transformers

    known = getattr(transformers, type(model).__name__, None) is type(model)
    return known and isinstance(model, transformers.PreTrainedModel)
