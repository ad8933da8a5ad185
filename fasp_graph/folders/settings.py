"""settings: the config.json of a pruned model, which says its shapes where the class has words."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from passes.compare import outputs
from passes.errors import FaspGraphError
from passes.lazy import is_lazy
from passes.skeleton import skeleton
from passes.state import steady

from ..emit.layout import plain_config
from .origin import Loaded, Pruning

PLAIN = ("native", "attributes")  # ways that a class built from another configuration can repeat
_BURNED = {
    "adapter": "code of the class has the old size burned in",
    "padded": "other code reads its weights at the old size",
    "graph": "the class's code does not run at the new size",
}


def write_config(model: Any, said: Any, folder: Path) -> None:
    """Write config.json: `said`, the configuration that says the pruned shapes, or else the dense
    one inside one of ours. It states the type of the weights as they are.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "save_pretrained"):
        return
    if not is_transformers(model):
        config.save_pretrained(folder)
        return
    config = _typed(copy.deepcopy(config if said is None else said), model.dtype)
    config.architectures = [type(model).__name__]
    if said is None:
        from .auto import FaspConfig

        dense = config.to_dict()
        dense.pop("_name_or_path", None)  # where the dense model lay on this machine
        config = FaspConfig(dense=dense, architectures=["FaspModel"], dtype=model.dtype)
    config.save_pretrained(folder)


def _typed(config: Any, dtype: torch.dtype) -> Any:
    """The configuration, and those inside, with the type of the weights (in place)."""
    config.dtype = dtype
    for name in getattr(config, "sub_configs", ()):
        if getattr(config, name, None) is not None:
            _typed(getattr(config, name), dtype)
    return config


def told_plain(model: nn.Module, pruning: Pruning) -> Pruning:
    """With a note in the report, where a uniform layout was asked for and a folder of the model
    will not load by plain `from_pretrained`.
    """
    why = _not_plain(model, pruning) if pruning.config.layout == "uniform" else ""
    if not why:
        return pruning
    told = (
        "layout='uniform' was asked for, but plain from_pretrained will not load a folder of this "
        f"model: {why} · help: load it after `import fasp_graph`, or leave that kind of groups out"
    )
    report = dataclasses.replace(pruning.report, notes=(*pruning.report.notes, told))
    return dataclasses.replace(pruning, report=report)


def _not_plain(model: nn.Module, pruning: Pruning) -> str:
    """Why plain `from_pretrained` will not load what is saved of a model; empty: it will."""
    ways = pruning.emission.ways
    others = [name for name, way in ways.items() if way not in PLAIN]
    if others:
        more = f" (and {len(others) - 1} more)" if len(others) > 1 else ""
        way = ways[others[0]]
        return f"group {others[0]}{more} became {way}, since {_BURNED[way]}"
    if not is_lazy(model) and said_config(model, pruning) is None:
        return f"no configuration was found with which {type(model).__name__} computes the same"
    return ""


def said_config(model: Any, pruning: Pruning | Loaded) -> Any:
    """The configuration that says the pruned shapes, if one does and its numbers are the same."""
    if isinstance(pruning, Loaded):
        return model.config if pruning.manifest.get("plain") else None
    if not is_transformers(model) or not set(pruning.emission.ways.values()) <= set(PLAIN):
        return None
    groups = pruning.report.groups
    changes = {(g.units // g.blocks, g.kept // g.blocks) for g in groups}
    said = plain_config(model, sorted(changes | {(g.units, g.kept) for g in groups}))
    if said is None:
        return None
    with torch.random.fork_rng(devices=[]):
        other = skeleton(lambda: type(model)(said)).to(next(model.parameters()).dtype).eval()
    other.load_state_dict(model.state_dict(), assign=True)
    with steady(model):
        expected = outputs(model.eval(), pruning.inputs)
    same = zip(expected, outputs(other, pruning.inputs), strict=False)
    agrees = all(a.shape == b.shape and torch.allclose(a, b, 0, 1e-6) for a, b in same)
    return said if agrees else None


def refuse_undersized(model: Any, parameters: Mapping[str, tuple[int, ...]]) -> None:
    """FaspGraphError if the model, of these shapes before it is pruned, is not what its
    configuration builds: a folder says how to make that smaller.
    """
    if not is_transformers(model):
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


def is_transformers(model: nn.Module) -> bool:
    """Whether the model's class is one that the installed transformers has by that name."""
    import transformers

    known = getattr(transformers, type(model).__name__, None) is type(model)
    return known and isinstance(model, transformers.PreTrainedModel)
