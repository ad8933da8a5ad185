"""build_type: model type of transformers, or family of timm -> a small random model and inputs
that it runs on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

from . import timm_families
from .policies import POLICIES, Policy
from .sample_inputs import candidates
from .shrink import shrunk

LARGEST = 60_000_000  # parameters of a shrunken model
PREFERRED = (
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
    "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
    "MODEL_FOR_BACKBONE_MAPPING_NAMES",
)


@dataclass(frozen=True)
class Built:
    """A model in eval mode, and keyword inputs."""

    model: nn.Module
    inputs: dict[str, Any]


class BuildError(Exception):
    """No policy gives a model that runs; the message holds the reason of each."""


def types() -> list[str]:
    """All model types that the installed transformers maps to some model class."""
    mapped = set().union(*(getattr(auto, name) for name in _tables()))
    return sorted(t for t in CONFIG_MAPPING if t in mapped)


def _tables() -> list[str]:
    return [name for name in dir(auto) if name.endswith("_MAPPING_NAMES") and "MODEL" in name]


def model_class(model_type: str) -> type:
    """The class with a language head where there is one, else the base model, else any."""
    masked = auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    order = [*PREFERRED, *_tables()]
    if model_type in masked and model_type in auto.MODEL_MAPPING_NAMES:
        order.insert(1, "MODEL_MAPPING_NAMES")
    for table in order:
        found = getattr(auto, table).get(model_type)
        found = found[0] if isinstance(found, (tuple, list)) else found
        if found and hasattr(transformers, found):
            return getattr(transformers, found)
    raise BuildError(f"no model class for {model_type}")


def build(model_type: str) -> Built:
    """Try the policies in order; BuildError lists why each failed."""
    if model_type.startswith(timm_families.PREFIX):
        model = timm_families.smallest(model_type, LARGEST)
        return _with_inputs(model, timm_families.images(model))
    cls = model_class(model_type)
    reasons = []
    for policy in POLICIES:
        try:
            return _attempt(cls, model_type, policy)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {_short(error)}")
        gc.collect()
    raise BuildError(" | ".join(dict.fromkeys(reasons)))


def _attempt(cls: Any, model_type: str, policy: Policy) -> Built:
    config = shrunk(CONFIG_MAPPING[model_type](), policy)
    if not isinstance(config, cls.config_class):
        parts = [v for v in vars(config).values() if isinstance(v, cls.config_class)]
        config = parts[0] if parts else config
    if getattr(config, "use_cache", None):
        config.use_cache = False
    with torch.device("meta"):
        size = sum(p.numel() for p in cls(config).parameters())
    if size > LARGEST:
        raise BuildError(f"{size:,} parameters")
    torch.manual_seed(0)
    model = cls(config).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")
    return _with_inputs(model, candidates(model))


def _with_inputs(model: nn.Module, given: Iterable[dict[str, Any]]) -> Built:
    """The model off its initial values, with the first inputs that it runs on."""
    _randomise(model)
    errors: dict[tuple[str, ...], str] = {}
    for inputs in given:
        try:
            with torch.no_grad():
                model(**inputs)
            return Built(model, inputs)
        except Exception as error:
            shapes = {k: tuple(v.shape) for k, v in inputs.items()}
            words = f"{shapes}: {type(error).__name__} {_short(error)}"
            errors.setdefault(tuple(inputs), words)
    raise BuildError("no inputs fit: " + " / ".join(list(errors.values())[:4]))


def _randomise(model: nn.Module) -> None:
    """Vectors off their defaults, so that a lost scale or bias shows in the numbers."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = 0.1 if parameter.dim() == 1 else 0.03
                parameter.add_(scale * torch.randn_like(parameter))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
