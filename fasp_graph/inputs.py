"""Models that cannot be pruned as they are: refused with the way out, before anything runs."""

from __future__ import annotations

from torch import Tensor, nn

from passes.errors import CaptureError, ConfigError
from passes.lazy import is_lazy

from .config import Config


def refuse_unmergeable(model: nn.Module) -> None:
    """CaptureError if weights are quantised, or low-rank adapters are not merged into them."""
    for name, parameter in model.named_parameters():
        data = parameter.data
        if not parameter.dtype.is_floating_point or _encoded(data):
            raise CaptureError(
                f"parameter {name} is {_kind(data)}: quantised weights cannot be cut or repaired · "
                "help: prune the model in its original precision, then quantise the result"
            )
    for name, module in model.named_modules():
        # PEFT's contract for a wrapped layer: `base_layer` holds the weight, `merged` tells
        if getattr(module, "merged", None) is False and isinstance(
            getattr(module, "base_layer", None), nn.Module
        ):
            raise CaptureError(
                f"{name} ({type(module).__name__}) holds an adapter that is not merged · help: "
                "call merge_and_unload() and prune what it returns"
            )


def refuse_unstreamable(model: nn.Module, config: Config) -> None:
    """ConfigError if weights are read one by one and the method needs all of them at once."""
    if is_lazy(model) and config.passes.allocation != "uniform":
        raise ConfigError(
            f"method={config.method} spreads the sparsity by allocation="
            f"{config.passes.allocation}, which needs all weights in memory · help: "
            "allocation='uniform', or method='fasp'"
        )


def _encoded(data: Tensor) -> bool:
    """A tensor subclass that holds other tensors (torchao), not a fake one or a plain one."""
    return type(data) is not Tensor and hasattr(data, "__tensor_flatten__")


def _kind(data: Tensor) -> str:
    return type(data).__name__ if type(data) is not Tensor else str(data.dtype).split(".")[-1]
