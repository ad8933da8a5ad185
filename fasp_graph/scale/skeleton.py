"""skeleton: a transformers configuration -> its model without weights, to analyse it.

    model = from_config(LlamaConfig(num_hidden_layers=80, ...))
    deps = fg.analyze(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})

Only shapes and buffers exist: 70 billion parameters take some megabytes. passes/skeleton.py says
how, for models of any library.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers

from passes.skeleton import skeleton


def from_config(
    config: transformers.PreTrainedConfig, kind: Any = None
) -> transformers.PreTrainedModel:
    """The model of `config` with parameters on the meta device, in eval mode.

    `kind`: an Auto class or a model class; by default `class_of`.
    """
    kind = kind or class_of(config)
    build = getattr(kind, "from_config", None) or kind._from_config
    return skeleton(lambda: build(config)).eval()


def class_of(config: transformers.PreTrainedConfig) -> Any:
    """The class whose weights these are, as the configuration says, so that no head is drawn at
    random and none is left out; else the causal language model where the type has one, else the
    base model.
    """
    for name in getattr(config, "architectures", None) or ():
        known: Any = getattr(transformers, str(name), None)
        ours = inspect.isclass(known) and issubclass(known, transformers.PreTrainedModel)
        if ours and known.config_class is type(config):
            return known
    causal = type(config) in transformers.AutoModelForCausalLM._model_mapping
    return transformers.AutoModelForCausalLM if causal else transformers.AutoModel
