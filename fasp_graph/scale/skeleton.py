"""skeleton: a transformers configuration -> its model without weights, to analyse it.

    model = from_config(LlamaConfig(num_hidden_layers=80, ...))
    deps = fg.analyze(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)})

Only shapes and buffers exist: 70 billion parameters take some megabytes. passes/skeleton.py says
how, for models of any library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig

from passes.skeleton import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def from_config(config: PreTrainedConfig, kind: Any = None) -> PreTrainedModel:
    """The model of `config` with parameters on the meta device, in eval mode.

    `kind`: an Auto class or a model class; by default the causal language model where the type has
    one, else the base model.
    """
    if kind is None:
        causal = type(config) in AutoModelForCausalLM._model_mapping
        kind = AutoModelForCausalLM if causal else AutoModel
    build = getattr(kind, "from_config", None) or kind._from_config
    return skeleton(lambda: build(config)).eval()
