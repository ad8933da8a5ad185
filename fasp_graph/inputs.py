"""Models that cannot be pruned as they are: refused with the way out, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from passes.errors import CaptureError, ConfigError
from passes.lazy import is_lazy
from passes.skeleton import has_numbers

from .config import Config
from .scale.devices import device_of
from .scale.distributed import world

UNQUANTISED = "prune the model in its original precision, then quantise the result"


def refuse_modelless(model: object) -> None:
    """CaptureError if what is given is no module, or has weights without numbers."""
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"model is {model!r:.80}, not a torch.nn.Module · help: pass the model itself; names "
            "and folders are for the command line"
        )
    if not has_numbers(model):
        raise CaptureError(
            f"{type(model).__name__} has weights without numbers (on the meta device), which can "
            "be analysed but not pruned · help: load the weights first"
        )


def refuse_unmergeable(model: nn.Module) -> None:
    """CaptureError if weights are quantised, or adapters or prompts are still beside them."""
    for name, what in _quantised(model):
        raise CaptureError(
            f"{name} is {what}: quantised weights cannot be cut or repaired · help: {UNQUANTISED}"
        )
    for name, module in model.named_modules():
        # PEFT's contract for a wrapped layer: `base_layer` holds the weight, `merged` tells whether
        # the adapter, which could be taken out again, is in it
        wrapped = isinstance(getattr(module, "base_layer", None), nn.Module)
        if wrapped and hasattr(module, "merged"):
            merged = "was merged and is still there" if module.merged else "is not merged"
            raise CaptureError(
                f"{name} ({type(module).__name__}) holds an adapter that {merged} · help: "
                "call merge_and_unload() and prune what it returns"
            )
    for name, module in model.named_modules():
        # its contract for a model: `peft_config` tells what is tuned; merge_and_unload deletes it
        if getattr(module, "peft_config", None):
            raise CaptureError(
                f"{name or 'the model'} ({type(module).__name__}) is tuned by prompts or adapters "
                "that cannot be merged · help: prune the model that it was made of, "
                "get_base_model(), and tune the result"
            )


def _quantised(model: nn.Module) -> Iterator[tuple[str, str]]:
    """What holds numbers that stand for others: (its name, how it is stored).

    Parameters of integers or of a class that holds several tensors (torchao, bitsandbytes), packed
    state (torch.ao), and what transformers says of a model that it quantised itself.
    """
    for name, parameter in model.named_parameters():
        number = parameter.dtype.is_floating_point or parameter.dtype.is_complex
        if not number or _encoded(parameter.data):
            yield f"parameter {name}", _kind(parameter.data)
    if is_lazy(model):
        return
    for name, held in model.state_dict().items():
        for leaf in pytree.tree_leaves(held):
            if isinstance(leaf, Tensor) and leaf.is_quantized:
                yield f"weight {name}", _kind(leaf)
    method = quantised_by(getattr(model, "config", None))
    if method:
        yield type(model).__name__, method


def quantised_by(config: Any) -> str:
    """The method that a transformers configuration names; empty: none."""
    stated = getattr(config, "quantization_config", None)
    if not stated:
        return ""
    found = stated if isinstance(stated, dict) else vars(stated)
    method = found.get("quant_method", type(stated).__name__)
    return str(getattr(method, "value", method))


def refuse_unstreamable(lazy: bool, config: Config) -> None:
    """ConfigError if weights are read one by one, or computed with elsewhere than they are, and
    the method needs all of them at once; or if a device cannot be used.
    """
    passes, elsewhere = config.passes, bool(config.compute_on)
    if (lazy or elsewhere) and passes.allocation != "uniform":
        raise ConfigError(
            f"method={config.method} spreads the sparsity by allocation={passes.allocation}, which "
            f"needs all weights {'on one device' if elsewhere else 'in memory'} · help: "
            "method='fasp', or allocation='uniform'"
        )
    if elsewhere and (passes.score == "taylor" or passes.restore == "outputs"):
        named = "score=taylor" if passes.score == "taylor" else "restore=outputs"
        raise ConfigError(
            f"{named} needs gradients, which compute_on has none of · help: method='fasp', "
            "score='obs', restore='affine'; or move the model to one device"
        )
    if elsewhere and config.budget == "latency":
        raise ConfigError(
            "budget=latency measures ops where the model is, not on the devices of compute_on · "
            "help: move the model to the device, or budget='parameters'"
        )
    if world()[1] > 1 and any(":" in name for name in config.compute_on):
        raise ConfigError(
            f"compute_on={','.join(config.compute_on)} would be the same devices for each of "
            f"{world()[1]} processes · help: compute_on=('cuda',) gives each on a machine its own"
        )
    for name in config.compute_on:
        device_of(name)


def _encoded(data: Tensor) -> bool:
    """A tensor subclass that holds other tensors (torchao), not a fake one or a plain one."""
    return type(data) is not Tensor and hasattr(data, "__tensor_flatten__")


def _kind(data: Tensor) -> str:
    return type(data).__name__ if type(data) is not Tensor else str(data.dtype).split(".")[-1]
