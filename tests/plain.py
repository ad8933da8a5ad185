"""A plain model for commands, captured in a tenth of the time that a decoder takes."""

import torch
from torch import nn


def several():
    """A model of named layers, its inputs, and enough to calibrate on."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, size in {"enter": (6, 40), "middle": (40, 30), "leave": (30, 3)}.items():
        model.add_module(name, nn.Linear(*size))
        model.add_module(f"after_{name}", nn.GELU())
    return model, torch.randn(3, 6), [torch.randn(64, 6) for _ in range(4)]
