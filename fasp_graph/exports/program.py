"""program: a graph module captured once more by torch.export, so that all its sizes agree."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args

_CHATTY = (
    *("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo", "torch.fx"),
    *("torch._inductor", "root"),  # onnxruntime's quantiser logs to the root
)


def program_of(module: GraphModule, inputs: Args, dynamic_shapes: Any) -> ExportedProgram:
    """`module` at `inputs`, with the dynamic axes that were asked for, or all; static where torch
    refuses them.
    """
    shapes = _automatic(inputs) if dynamic_shapes is None else dynamic_shapes
    try:
        return torch.export.export(
            module, inputs[0], inputs[1], dynamic_shapes=shapes, strict=False
        )
    except Exception:  # torch.export raises errors of many unrelated types
        return torch.export.export(module, inputs[0], inputs[1], strict=False)


def _automatic(inputs: Args) -> Any:
    """Dim.AUTO on every axis > 1, in the form that torch.export takes: by position or by name."""
    args, kwargs = pytree.tree_map(
        lambda v: (
            {d: Dim.AUTO for d, n in enumerate(v.shape) if n > 1} if isinstance(v, Tensor) else None
        ),
        inputs,
    )
    return dict(kwargs) if kwargs and not args else tuple(args) if not kwargs else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters' prints, warnings and log lines are dropped; errors still raise."""
    levels = {name: logging.getLogger(name).level for name in _CHATTY}
    sink = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sink))
        stack.enter_context(contextlib.redirect_stderr(sink))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for name, level in levels.items():
            logging.getLogger(name).setLevel(logging.CRITICAL)
            stack.callback(logging.getLogger(name).setLevel, level)
        yield
