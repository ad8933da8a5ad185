"""refuse: what capture cannot take, said before or after torch.export has tried."""

from __future__ import annotations

import keyword
import operator
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.parameter import is_lazy
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from .errors import CaptureError, brief, user_line, where
from .tracing import real_or_complex
from .visit import op_name

_TORCH = str(Path(torch.__file__).parent) + os.sep
_HERE = str(Path(__file__).parent) + os.sep
_PACKING = str(Path(nn.utils.rnn.__file__))
_PACKED = "the numbers in a tensor decide how many rows each step of a packed sequence has"
_PADDED = (
    "run the recurrent layer on the padded batch, and choose or mask its outputs by the lengths"
)
_GRAPHS_OWN = {*dir(GraphModule(nn.Module(), Graph()))} - {*dir(nn.Module())}
_DATA_DEPENDENT = ("data-dependent", "GuardOnDataDependent", "DataDependentOutput")


def refuse(model: nn.Module, args: Any) -> None:
    """CaptureError for parameters that are no plain floating-point tensors on one device, and for
    names that cannot stand in a graph.
    """
    _refuse_names(model)
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise CaptureError(
                f"module {name or type(model).__name__} is wrapped by FSDP, which flattens weights "
                "· help: capture the model before it is wrapped"
            )
    _refuse_computed(model)
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
        listed = ", ".join(sorted(devices))
        raise CaptureError(
            f"the model and its inputs are spread over {listed} · help: move both to one device; a "
            "model too large for any of them stays on the CPU (loaded without device_map), and "
            "Config(compute_on=...) names devices to compute on"
        )


def _refuse_names(model: nn.Module) -> None:
    """CaptureError for names that would end a string, or the line, in the code that torch.fx
    generates, and for names at the top that a GraphModule has for itself.
    """
    for name, _ in model.named_modules():
        if re.search(r"[\"\\\x00-\x1f]", name):
            raise CaptureError(
                f"the module name {name!r} holds a quote, a backslash or a control character, "
                "which torch.fx writes into code as it is · help: rename the module"
            )
    weights = dict([*model.named_parameters(), *model.named_buffers()])
    for name in (*dict(model.named_modules()), *weights):
        if any(map(keyword.iskeyword, name.split("."))):
            raise CaptureError(
                f"the name {name} holds a word of Python, which torch.fx writes into code as it is "
                "· help: rename what it names"
            )
    tensors = {name for name, held in vars(model).items() if isinstance(held, Tensor)}
    for name in (*model._modules, *model._parameters, *model._buffers, *tensors):
        if name in _GRAPHS_OWN:
            raise CaptureError(
                f"{type(model).__name__}.{name} has a name that torch.fx.GraphModule needs for "
                "itself · help: rename it, or prune a module that holds the model (self.model = "
                f"model, and a forward that calls it): the name is model.{name} there"
            )


def _refuse_computed(model: nn.Module) -> None:
    """CaptureError for a kept result of autograd, which nothing can copy: what hooks of old make
    of parameters before each call.
    """
    for name, module in model.named_modules():
        for key, held in vars(module).items():
            if isinstance(held, Tensor) and not held.is_leaf:
                raise CaptureError(
                    f"module {name or type(model).__name__} keeps {key}, which is computed from "
                    "parameters outside of forward and cannot be copied · help: for "
                    "torch.nn.utils.weight_norm call torch.nn.utils.remove_weight_norm(module), or "
                    "use torch.nn.utils.parametrizations.weight_norm; compute other tensors in "
                    "forward"
                )


def refuse_packed(inputs: Any) -> None:
    """CaptureError for packed sequences among inputs or in a calibration batch."""
    leaves = pytree.tree_leaves(inputs, is_leaf=lambda held: isinstance(held, PackedSequence))
    if any(isinstance(leaf, PackedSequence) for leaf in leaves):
        raise CaptureError(f"a PackedSequence cannot be an input: {_PACKED} · help: {_PADDED}")


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
    text = str(error)
    line = source_line(error)
    at = f" · {line}" if line else ""
    if _packs(error):
        return f"{type(model).__name__} cannot be captured: {_PACKED}{at} · help: {_PADDED}"
    if depends_on_data(error):
        return (
            f"torch.export cannot capture {type(model).__name__}: data-dependent control flow or "
            f"shape{at} · help: the forward must not branch on the numbers in a tensor; prune the "
            f"part of the model that can be captured · torch says: {brief(text, 300)}"
        )
    return (
        f"torch.export cannot capture {type(model).__name__}: {type(error).__name__}: "
        f"{brief(text, 500)}{at} · help: try other example inputs, or prune the part of the model "
        "that can be captured; the forward must not branch on data"
    )


def autocast_line(module: GraphModule) -> str:
    """Where an exported forward first computes under torch.autocast; empty if nowhere."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, GraphModule) else ():
            if op_name(node) == "wrap_with_autocast" and node.args[2]:
                body = operator.attrgetter(str(node.args[4].target))(part)
                lines = [where(inner) for inner in body.graph.nodes if user_line(inner)]
                return next(iter(lines), where(node))
    return ""


def under_autocast(line: str) -> str:
    """What to do where the graph, which has no autocast, computes other numbers for that."""
    return (
        f"forward computes under torch.autocast, in two precisions that a graph does not tell · "
        f"{line} · help: take torch.autocast out of forward (enter it around the call of the "
        "pruned model instead), or convert the model: model.bfloat16()"
    )


def depends_on_data(error: Exception) -> bool:
    """Whether torch.export met a size or a branch that the numbers in a tensor decide."""
    text = f"{type(error).__name__} {error}"
    return any(word in text for word in _DATA_DEPENDENT)


def source_line(error: BaseException) -> str:
    """`file.py:12 in forward`: the deepest frame outside torch and this package."""
    found = ""
    for frame, line in _frames(error):
        code = frame.f_code
        if not code.co_filename.startswith((_TORCH, _HERE, "<")):
            found = f"{Path(code.co_filename).name}:{line} in {code.co_name}"
    return found


def failed_at(error: BaseException) -> str:
    """` · ` and `where` of the node that an exporter of torch was at when it failed, under the name
    that it had when it was captured; empty if it was at none.
    """
    held = [frame.f_locals.get("node") for frame, _ in _frames(error)]
    nodes = [node for node in held if isinstance(node, Node)]
    return f" · {where_captured(nodes[-1])}" if nodes else ""


def where_captured(node: Node) -> str:
    """`where` of a node, under the name of the node of the first program that it was made from,
    however often it was exported.
    """
    name, sources = node.name, node.meta.get("from_node")
    while sources:
        name, sources = sources[-1].name, sources[-1].from_node
    return where(node, name)


def _packs(error: BaseException) -> bool:
    """Whether an error came up where a packed sequence is made or read."""
    return any(
        frame.f_code.co_filename == _PACKING
        or any(isinstance(held, PackedSequence) for held in frame.f_locals.values())
        for frame, _ in _frames(error)
    )


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames and lines that an error went through, then those of what caused it."""
    chain: BaseException | None = error
    while chain is not None:
        yield from traceback.walk_tb(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__
