"""timm_families: a family of timm (one of its modules) -> its smallest model, at a small image.

`pip install -c constraints.txt timm`, with the torchvision that belongs to the installed torch.
"""

from __future__ import annotations

import re

import torch
from torch import nn

PREFIX = "timm:"
SMALL = re.compile(
    r"atto|femto|pico|nano|zepto|tiny|micro|mini|xx?s\b|small|_[st]\b|[_b]0\b|18|test"
)
VARIANTS = 12  # of a family are built without weights, to see how large they are
IMAGES = (128, 64, 96, 160, 192, 224, 256, 384)  # at 64 a last stage may have one position left


def families() -> list[str]:
    """`timm:` and the name of each module of timm that registers models."""
    import timm

    return [PREFIX + name for name in timm.list_modules() if timm.list_models(module=name)]


def smallest(family: str, largest: int) -> nn.Module:
    """The model of fewest parameters among the variants whose names sound small, random weights.
    ValueError if even that has more than `largest`.
    """
    import timm

    names = timm.list_models(module=family.removeprefix(PREFIX))
    names = sorted(names, key=lambda name: (not SMALL.search(name), len(name)))[:VARIANTS]
    sizes = {}
    for name in names:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in timm.create_model(name).parameters())
    name = min(sizes, key=sizes.__getitem__)
    if sizes[name] > largest:
        raise ValueError(f"{sizes[name]:,} parameters")
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(name)
    return model.eval()


def images(model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """Inputs to try: two images, small ones first."""
    channels = model.default_cfg["input_size"][0]  # type: ignore[index]
    return [{"x": torch.randn(2, channels, size, size)} for size in IMAGES]
