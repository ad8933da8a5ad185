"""devices: where a walk computes, and what it may hold there."""

from __future__ import annotations

import os

import torch
from torch import nn

from passes.errors import ConfigError

from ..config import Config
from .spill import HOST, Spill


def bounds(module: nn.Module, config: Config) -> tuple[Spill | None, tuple[torch.device, ...]]:
    """What keeps a walk over the module within max_memory, and the devices that it computes on;
    none: where the model is, from where nothing is moved.
    """
    settle = None if config.max_memory is None else Spill(config.max_memory)
    own = next((held.device for held in module.parameters()), HOST)
    back = (own,) if settle and own != HOST else ()
    return settle, tuple(map(device_of, config.compute_on)) or back


def device_of(text: str) -> torch.device:
    """The device that `text` names, tried with one number; under torchrun each process on a
    machine has its own GPU.
    """
    if text == "cuda":
        text = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        place = torch.empty(1, device=text).device
        torch.cuda.set_device(place) if place.type == "cuda" else None
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # torch built without a device says so with an AssertionError
        raise ConfigError(
            f"device {text!r} cannot be used: {str(error).splitlines()[0]} · help: cpu, or cuda "
            "with a torch built for it"
        ) from error
    if place.type == "meta":
        raise ConfigError("device 'meta' holds no numbers · help: cpu, cuda")
    return place
