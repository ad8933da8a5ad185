"""Models to prune: name -> model, example inputs, calibration batches, held-out tokens.

llama, opt      trained (models_zoo/train.py) on the standard library's source
the others      small, with random weights, one builder function each
"""

from __future__ import annotations

from collections.abc import Callable

from . import decoders, encoders, pretrained, vision
from .entry import Entry

__all__ = ["BUILDERS", "Entry", "load", "names"]

BUILDERS: dict[str, Callable[[], Entry]] = {
    "llama": pretrained.llama,
    "opt": pretrained.opt,
    "opt-random": decoders.opt,
    "llama-random": decoders.llama,
    "gpt2": decoders.gpt2,
    "gpt-neox": decoders.gpt_neox,
    "phi3": decoders.phi3,
    "bert": encoders.bert,
    "vit": encoders.vit,
    "resnet": vision.resnet,
}


def names() -> list[str]:
    """All names that `load` knows."""
    return list(BUILDERS)


def load(name: str) -> Entry:
    """Build or load one entry; KeyError names the known ones."""
    if name not in BUILDERS:
        raise KeyError(f"no zoo model {name!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name]()
