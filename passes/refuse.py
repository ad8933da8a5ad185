"""refuse: what capture cannot take, said before or after torch.export has tried."""

from __future__ import annotations

import re
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from .errors import CaptureError
from .tracing import real_or_complex

_TORCH = str(Path(torch.__file__).parent)
_HERE = str(Path(__file__).parent)
_DATA_DEPENDENT = ("data-dependent", "GuardOnDataDependent", "DataDependentOutput")


def refuse(model: nn.Module, args: Any) -> None:
    """CaptureError for parameters that are no plain floating-point tensors on one device, and for
    names that would end a string in the code that torch.fx generates.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CaptureError(
                f"module {name or type(model).__name__} is wrapped by FSDP, which flattens weights "
                "· help: capture the model before it is wrapped"
            )
        if re.search(r"[\"\\\x00-\x1f]", name):
            raise CaptureError(
                f"the module name {name!r} holds a quote, a backslash or a control character, "
                "which torch.fx writes into code as it is · help: rename the module"
            )
    for name, parameter in model.named_parameters():
        reason = _objection(parameter)
        if reason:
            raise CaptureError(f"parameter {name} {reason}")
    for name, buffer in model.named_buffers():
        if buffer.is_meta:
            raise CaptureError(
                f"buffer {name} is on the meta device: its numbers are lost, and they decide what "
                "the graph looks like · help: build the model with passes.skeleton.skeleton"
            )
    leaves = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    tensors = [*model.parameters(), *model.buffers(), *leaves]
    devices = {str(t.device) for t in tensors if not t.is_meta}
    if len(devices) > 1:
        raise CaptureError(
            f"the model and its inputs are spread over {', '.join(sorted(devices))} · help: move "
            "both to one device; the analysis itself needs none of the weights' numbers"
        )


def _objection(parameter: Tensor) -> str:
    if is_lazy(parameter):
        return "is lazy: it has no shape yet · help: call the model once before capture"
    kind = type(parameter).__name__
    if kind == "DTensor" or type(getattr(parameter, "data", None)).__name__ == "DTensor":
        return "is a DTensor (sharded) · help: gather the full weights before capture"
    if not real_or_complex(parameter) or parameter.element_size() < 2:
        return (
            f"is {parameter.dtype}, not floating point of 16 bits or more: quantised models "
            "cannot be pruned · help: prune first, then quantise"
        )
    return ""


def explain(model: nn.Module, error: Exception) -> str:
    """What torch.export's error means, with the line of the model's code that caused it."""
    if isinstance(error, CaptureError):
        return f"{error} · model {type(model).__name__}"
    text = " ".join(str(error).split())
    line = source_line(error)
    at = f" · {line}" if line else ""
    if depends_on_data(error):
        return (
            f"torch.export cannot capture {type(model).__name__}: data-dependent control flow or "
            f"shape{at} · help: the forward must not branch on the numbers in a tensor; prune the "
            f"part of the model that can be captured · torch says: {text[:300]}"
        )
    return (
        f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: {text[:500]}"
        f"{at} · help: try other example inputs, or prune the part of the model that can be "
        "captured; the forward must not branch on data"
    )


def depends_on_data(error: Exception) -> bool:
    """Whether torch.export met a size or a branch that the numbers in a tensor decide."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in _DATA_DEPENDENT)


def source_line(error: BaseException) -> str:
    """`file.py:12 in forward`: the deepest frame outside torch and this package."""
    found = ""
    chain: BaseException | None = error
    while chain is not None:
        for frame in traceback.extract_tb(chain.__traceback__):
            if not frame.filename.startswith((_TORCH, _HERE, "<")):
                found = f"{Path(frame.filename).name}:{frame.lineno} in {frame.name}"
        chain = chain.__cause__ or chain.__context__
    return found
