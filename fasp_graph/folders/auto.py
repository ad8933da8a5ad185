"""transformers' Auto classes load folders of pruned models once fasp_graph is imported.

A folder whose shapes no configuration can say has model_type fasp_graph in its config.json, the
dense configuration inside. `AutoModelForCausalLM.from_pretrained(folder)` then returns the user's
own class, as `fasp_graph.load` does; transformers without fasp_graph refuses such a folder by name.
"""

from __future__ import annotations

import os
from typing import Any

import huggingface_hub
import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from passes.errors import FaspGraphError

from .loading import load


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
    def from_pretrained(cls, name: str | os.PathLike[str], *args: Any, **options: Any) -> nn.Module:
        """The pruned model in a folder or hub repository; `dtype` and `device_map` are honoured."""
        root = name if os.path.isdir(name) else huggingface_hub.snapshot_download(str(name))
        model = load(root)
        made = cls.auto._model_mapping.get(type(model.config), ()) if cls.auto else type(model)
        if cls.auto is transformers.AutoModel and type(model.base_model) is made:
            model = model.base_model
        elif type(model) not in (made if isinstance(made, tuple) else (made,)):
            raise FaspGraphError(
                f"{root} holds a {type(model).__name__}, which {cls.auto.__name__} does not make · "
                "help: take the Auto class of its task, or fasp_graph.load"
            )
        dtype = options.get("dtype", options.get("torch_dtype"))
        if isinstance(dtype, str) and dtype != "auto":
            dtype = getattr(torch, dtype)
        if isinstance(dtype, torch.dtype):
            model = model.to(dtype)
        device = options.get("device_map")
        return (
            model.to(device)
            if isinstance(device, (str, torch.device)) and device != "auto"
            else model
        )

    @classmethod
    def _from_config(cls, config: FaspConfig, **options: Any) -> nn.Module:
        """What an Auto class calls to make a model with random weights."""
        raise FaspGraphError(
            "the sizes of a pruned model are in its folder, not in its configuration · help: "
            "from_pretrained(folder), or fasp_graph.load(folder)"
        )


def register() -> None:
    """Make every Auto class with a head, and AutoModel, know FaspConfig."""
    transformers.AutoConfig.register(FaspConfig.model_type, FaspConfig, exist_ok=True)
    for name, auto in vars(modeling_auto).items():
        if name.startswith("AutoModel") and hasattr(auto, "_model_mapping"):
            made = type(f"Fasp{name}", (FaspModel,), {"auto": auto})
            auto.register(FaspConfig, made, exist_ok=True)


register()
