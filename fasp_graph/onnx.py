"""ONNX: the compact graph as one file that ONNX Runtime runs, with the plan in its metadata.

The graph is captured again (sizes are then consistent everywhere), exported, checked by
onnx.checker and compared with the graph module in ONNX Runtime, on the example inputs and on inputs
of another batch and sequence size. Only a file that passed all of it appears at the path.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnxruntime
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args, tensors
from passes.errors import FaspGraphError, VerificationError
from passes.kernels import narrow

from .jsontext import to_json

if TYPE_CHECKING:
    from .prune import Pruned

OPSET = 18
EXTERNAL_DATA_BYTES = 1_800_000_000  # protobuf holds at most 2 GB
_CHATTY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo", "torch.fx")


def export_onnx(pruned: Pruned, path: str | os.PathLike[str]) -> Path:
    """Write the compact graph as ONNX and return its path; dynamic wherever the capture is.

    Raises VerificationError, and writes nothing, if ONNX Runtime computes other numbers.
    """
    metadata = {"fasp_graph.plan": to_json(pruned.plan.to_dict())}
    plain = narrow(pruned.graph_module)  # ONNX Runtime has no use for the padding, and pays for it
    return export_graph(plain, pruned.inputs, pruned.dynamic_shapes, Path(path), metadata)


def export_graph(
    module: GraphModule,
    inputs: Args,
    dynamic_shapes: Any,
    path: Path,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write any captured graph as ONNX: the work of `export_onnx`."""
    if not path.parent.is_dir():
        raise FaspGraphError(f"the folder {path.parent} does not exist · help: create it first")
    if path.is_dir():
        raise FaspGraphError(f"{path} is a folder · help: give the path of a file")
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        draft = temporary / path.name
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                _capture(module, inputs, dynamic_shapes),
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
            )
        if program is None:
            raise FaspGraphError("torch.onnx.export returned no program")
        program.model.metadata_props.update(metadata or {})
        size = sum(p.numel() * p.element_size() for p in module.parameters())
        program.save(draft, external_data=size > EXTERNAL_DATA_BYTES)
        onnx.checker.check_model(str(draft))
        _compare(module, inputs, draft)
        for file in sorted(temporary.iterdir(), key=lambda file: file == draft):
            os.replace(file, path.parent / file.name)
    except FaspGraphError:
        raise
    except Exception as error:
        raise FaspGraphError(
            f"the graph cannot be written as ONNX: {str(error).strip()[:600]}"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return path


def onnx_session(path: str | os.PathLike[str]) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as torch has."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Args) -> list[Tensor]:
    """Outputs of a session on (args, kwargs) of the graph module that it was made of."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(leaves):
        raise VerificationError(
            f"the ONNX model takes {len(names)} inputs, the graph {len(leaves)}"
        )
    feed = {name: leaf.cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _capture(module: GraphModule, inputs: Args, dynamic_shapes: Any) -> ExportedProgram:
    shapes = _automatic(inputs) if dynamic_shapes is None else dynamic_shapes
    try:
        return torch.export.export(
            module, inputs[0], inputs[1], dynamic_shapes=shapes, strict=False
        )
    except Exception:
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


def _compare(module: GraphModule, inputs: Args, path: Path) -> None:
    """ONNX Runtime equals the graph module at the example size and at another, if it is dynamic."""
    session = onnx_session(path)
    for case in (inputs, *_other_sizes(module, inputs, session)):
        with torch.no_grad():
            expected = tensors(module(*case[0], **case[1]))
        actual = run_session(session, case)
        if len(actual) != len(expected):
            raise VerificationError(
                f"ONNX Runtime returns {len(actual)} outputs, the graph {len(expected)}"
            )
        for k, (left, right) in enumerate(zip(expected, actual, strict=True)):
            _same(left.cpu(), right, k)


def _same(left: Tensor, right: Tensor, output: int) -> None:
    if left.shape != right.shape:
        raise VerificationError(
            f"output {output}: ONNX Runtime gives shape {tuple(right.shape)}, the graph "
            f"{tuple(left.shape)}"
        )
    tolerance = 2e-2 if left.dtype in (torch.float16, torch.bfloat16) else 5e-4
    left, right = left.double(), right.double()
    scale = max(1.0, float(left.abs().max())) if left.numel() else 1.0
    if not torch.allclose(left, right, rtol=0, atol=tolerance * scale, equal_nan=True):
        worst = float((left - right).abs().max()) / scale
        raise VerificationError(
            f"output {output}: ONNX Runtime and the graph differ by {worst:.1e} (allowed "
            f"{tolerance:.0e}); "
            "nothing was written"
        )


def _other_sizes(
    module: GraphModule, inputs: Args, session: onnxruntime.InferenceSession
) -> Iterator[Args]:
    """Inputs with every dynamic axis doubled, or halved where the model takes no more."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    shapes = [entry.shape for entry in session.get_inputs()]
    free = [[isinstance(size, str) for size in shape] for shape in shapes]
    names = [size for shape in shapes for size in shape if isinstance(size, str)]
    if not names or not all(name.isidentifier() for name in names):
        return
    for numerator, denominator in ((2, 1), (1, 2)):
        fresh = iter(
            [
                _resized(leaf, axes, numerator, denominator)
                for leaf, axes in zip(leaves, free, strict=True)
            ]
        )
        case = pytree.tree_map(
            lambda v, fresh=fresh: next(fresh) if isinstance(v, Tensor) else v, inputs
        )
        try:
            with torch.no_grad():
                module(*case[0], **case[1])
        except (RuntimeError, IndexError):
            continue  # a table of positions ends here, say
        yield case
        return


def _resized(value: Tensor, axes: list[bool], numerator: int, denominator: int) -> Tensor:
    """`value` repeated or cut to the new sizes; numbers are new, 0/1 masks stay."""
    for dim, free in enumerate(axes):
        if free:
            size = max(2, value.shape[dim] * numerator // denominator)
            value = value.index_select(dim, torch.arange(size) % value.shape[dim])
    if value.is_floating_point():
        return torch.randn(value.shape, dtype=value.dtype)
    if value.numel() and value.max() > 1:
        return value.roll(1, -1).contiguous()
    return value.contiguous()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's prints, warnings and log lines are dropped; errors still raise."""
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
