"""transformers' Auto classes load folders of pruned models once fasp_graph is imported.

A folder whose shapes no configuration can say has model_type fasp_graph in its config.json, the
dense configuration inside. `AutoModelForCausalLM.from_pretrained(folder)` then returns the user's
own class, as `fasp_graph.load` does; transformers without fasp_graph refuses such a folder by name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from passes.errors import FaspGraphError

from .loading import load
from .origin import origin_of, remember

_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_IDLE = (  # options that change nothing here: no code is run, no pickle read, all memory is needed
    *("trust_remote_code", "adapter_kwargs", "use_safetensors", "weights_only", "_from_auto"),
    *("low_cpu_mem_usage", "offload_folder", "_commit_hash", "config", "output_loading_info"),
)
_SWITCHES = ("use_cache", "output_hidden_states", "return_dict")  # of a run, not of what is built
_INFO = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


class FaspConfig(transformers.PretrainedConfig):  # type: ignore[misc]
    """`dense`: the configuration of the model before it was pruned."""

    model_type = "fasp_graph"

    def __init__(self, dense: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.dense = dense or {}


class FaspModel:
    """What the Auto classes know: never an instance, only a way to `fasp_graph.load`. No
    PreTrainedModel: they ask for none, and importing that class takes seconds.
    """

    config_class = FaspConfig
    auto: Any = None

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], **options: Any) -> Any:
        """The pruned model in a folder or hub repository, with transformers' options for where it
        is read from, `dtype`, `device_map` (one device), `attn_implementation`,
        `output_loading_info` and what a run gives back; others are refused.
        """
        given = {key: held for key, held in options.items() if held or isinstance(held, (int, str))}
        root = _folder(name, given)
        wanted = _wanted(given, root)
        model = load(root)
        made = cls.auto._model_mapping.get(type(model.config), ()) if cls.auto else type(model)
        if cls.auto is transformers.AutoModel and type(model.base_model) is made:
            model = remember(model.base_model, origin_of(model))  # which cannot be saved alone
        elif type(model) not in (made if isinstance(made, tuple) else (made,)):
            raise FaspGraphError(
                f"{root} holds a {type(model).__name__}, which {cls.auto.__name__} does not make · "
                "help: take the Auto class of its task, or fasp_graph.load"
            )
        if wanted.attention is not None:
            model.set_attn_implementation(wanted.attention)
        for key, held in wanted.switches.items():
            setattr(model.config, key, held)
        model = model.to(wanted.device, wanted.dtype)
        info: dict[str, Any] = {key: [] for key in _INFO}  # all weights are there, or load fails
        return (model, info) if options.get("output_loading_info") else model

    @classmethod
    def _from_config(cls, config: FaspConfig, **options: Any) -> nn.Module:
        """What an Auto class calls to make a model with random weights."""
        raise FaspGraphError(
            "the sizes of a pruned model are in its folder, not in its configuration · help: "
            "from_pretrained(folder), or fasp_graph.load(folder)"
        )


@dataclass(frozen=True)
class _Wanted:
    """What the options ask of a loaded model; None: as it is."""

    dtype: torch.dtype | None
    device: torch.device | None
    attention: Any
    switches: dict[str, Any]


def _folder(name: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The folder that a name and the options of the hub (taken out) stand for, on this machine."""
    hub = {key: options.pop(key) for key in _HUB if key in options}
    part = options.pop("subfolder", "")
    root = name if os.path.isdir(name) else huggingface_hub.snapshot_download(str(name), **hub)
    return Path(root, part)


def _wanted(options: dict[str, Any], root: Path) -> _Wanted:
    """What the options ask for; FaspGraphError for one that cannot be honoured."""
    dtype = options.pop("dtype", None) or options.pop("torch_dtype", None)
    device = options.pop("device_map", None)
    attention = options.pop("attn_implementation", None)
    switches = {key: options.pop(key) for key in _SWITCHES if key in options}
    config = options.get("config")
    if isinstance(config, FaspConfig):  # transformers has put into it what it has a field for
        attention = attention or config._attn_implementation
        held, own = config.to_dict(), FaspConfig.from_pretrained(root).to_dict()
        changed = {k for k in held if not k.startswith("_") and held[k] != own.get(k)} - {"dtype"}
        switches |= {key: held[key] for key in changed.intersection(_SWITCHES)}
        options |= dict.fromkeys(changed.difference(_SWITCHES), True)
    unknown = sorted(key for key, held in options.items() if key not in _IDLE and held is not None)
    if unknown:
        raise FaspGraphError(
            f"{unknown[0]} cannot be honoured for a pruned model, whose folder says how it is "
            "built · help: leave it out, and set it on the model, or quantise, after loading"
        )
    return _Wanted(_dtype(dtype), _device(device), attention, switches)


def _one(said: Any) -> Any:
    """What a table says of every module alike; anything else as it is."""
    same = isinstance(said, dict) and len(set(said.values())) == 1
    return next(iter(said.values())) if same else said


def _dtype(said: Any) -> torch.dtype | None:
    """One type for all weights; None: as they are stored."""
    said = _one(said)
    found = getattr(torch, said, said) if isinstance(said, str) else said
    if found not in (None, "auto") and not isinstance(found, torch.dtype):
        raise FaspGraphError(
            f"dtype={said!r} is no type of torch · help: name one, such as 'float16', or 'auto'"
        )
    return found if isinstance(found, torch.dtype) else None


def _device(said: Any) -> torch.device | None:
    """One device, for a model is not spread over several."""
    said = _one(said)
    if said == "auto":
        said = torch.accelerator.current_accelerator() or "cpu"
    try:
        return None if said is None else torch.device(said)
    except (RuntimeError, TypeError) as error:
        raise FaspGraphError(
            f"device_map={said!r} is no single device of this machine · help: name one, such as "
            "'cpu' or 'cuda:0'; accelerate.dispatch_model spreads a loaded model"
        ) from error


def register() -> None:
    """Make every Auto class with a head, and AutoModel, know FaspConfig."""
    transformers.AutoConfig.register(FaspConfig.model_type, FaspConfig, exist_ok=True)
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping"):
            made = type(f"Fasp{name}", (FaspModel,), {"auto": auto})
            auto.register(FaspConfig, made, exist_ok=True)


register()
