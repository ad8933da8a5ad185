"""ONNX: the compact graph as one file that ONNX Runtime runs, with the plan in its metadata.

The graph is captured again (sizes are then consistent everywhere), exported, checked by
onnx.checker and compared with the graph module in ONNX Runtime, on the example inputs and on inputs
of another batch and sequence size. Only a file that passed all of it appears at the path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.capture import Args
from passes.compare import outputs
from passes.errors import REPORT, FaspGraphError, VerificationError, brief
from passes.kernels import narrow
from passes.refuse import where_captured
from passes.verify import difference

from ..folders.drafts import MOST, draft
from ..jsontext import to_json
from .onnx_reduce import reduce
from .other_sizes import other_sizes
from .program import program_of, quiet
from .sayable import sayable

if TYPE_CHECKING:
    import onnxruntime

    from ..prune import Pruned

OPSET = 18
EXTERNAL_DATA_BYTES = 1_800_000_000  # protobuf holds at most 2 GB


@dataclass(frozen=True)
class Form:
    """How a graph is written.

    input_names, output_names   of the tensors, in order; None: the model's own
    axes                        input -> axis -> name of its size; empty: the usual ones
    cases                       inputs to compare at; None: the example and another size
    dtype                   float32 (the graph's own), float16 or int8 (dynamic, weights only)
    external_data_bytes         weights of more bytes than this lie in a file of their own beside
    """

    input_names: Sequence[str] | None = None
    output_names: Sequence[str] | None = None
    axes: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    cases: Sequence[Args] | None = None
    dtype: str = "float32"
    external_data_bytes: int = EXTERNAL_DATA_BYTES


def export_onnx(pruned: Pruned | nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write the compact graph as ONNX and return its path; dynamic wherever the capture is.

    Raises VerificationError, and writes nothing, if ONNX Runtime computes other numbers.
    `fasp_graph.exports.export` has the options: with a cache, in parts, float16, int8.
    """
    from .export import export

    return Path(export(pruned, path).path)


def graph_call(
    pruned: Pruned, path: str | os.PathLike[str]
) -> tuple[GraphModule, Args, Any, Path, dict[str, str]]:
    """The arguments of `write_graph` for a model as `prune` made it; they can be sent to another
    process.
    """
    metadata = {"fasp_graph.plan": to_json(pruned.plan.to_dict())}
    plain = narrow(pruned.graph_module)  # ONNX Runtime has no use for the padding, and pays for it
    return plain, pruned.inputs, pruned.dynamic_shapes, Path(path), metadata


def write_graph(
    module: GraphModule,
    inputs: Args,
    dynamic_shapes: Any,
    path: Path,
    metadata: Mapping[str, str] | None = None,
    form: Form = Form(),
) -> float:
    """Write any captured graph as ONNX: the work of `export_onnx`. Inputs that the graph holds for
    constants are none of the file. The largest difference to the graph, relative to each output's
    largest number.
    """
    import onnx

    module, inputs = sayable(module, inputs)
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    external = size > form.external_data_bytes
    with draft(path, "ONNX", ".onnx") as made:
        program = _program(module, inputs, dynamic_shapes, form)
        program.model.metadata_props.update(metadata or {})
        program.save(made, external_data=external)
        onnx.checker.check_model(str(made))
        with _told_of(program.model):
            worst = _compare(module, inputs, made, form)
        if form.dtype != "float32":
            with quiet():
                reduce(made, form.dtype, external)
            onnx.checker.check_model(str(made))
            with _told_of(program.model):
                worst = _compare(module, inputs, made, form)
    if not external:  # an earlier file at this path may have had weights of its own beside
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
    return worst


@contextmanager
def _told_of(model: Any) -> Iterator[None]:
    """FaspGraphError where ONNX Runtime refuses a node of the file: of the node it was made of."""
    import onnx_ir as ir

    try:
        yield
    except Exception as error:  # its errors have no common type
        for made in ir.traversal.RecursiveGraphIterator(model.graph):
            if f"'{made.name}'" in str(error) and isinstance(made.meta.get("node"), Node):
                raise FaspGraphError(
                    f"ONNX Runtime does not run the graph: {brief(error, MOST)} · "
                    f"{where_captured(made.meta['node'])} · help: another dtype or format may do"
                ) from error
        raise


def _program(module: GraphModule, inputs: Args, dynamic_shapes: Any, form: Form) -> Any:
    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            program_of(module, inputs, dynamic_shapes),
            dynamo=True,
            opset_version=OPSET,
            verbose=False,
            input_names=form.input_names,
            output_names=form.output_names or _own_names(module),
        )
    if program is None:
        raise FaspGraphError("torch.onnx.export returned no program · help: format='pt2' may work")
    _rename_others(program.model)
    _name_axes(program.model, form.axes)
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces: half of a small file, and this machine's paths
    return program


def _own_names(module: GraphModule) -> list[str] | None:
    """`logits`, as the model's output calls it; without names `output`, or `output_0`..."""
    spec, nodes = getattr(module, "_out_spec", None), list(module.graph.nodes)
    results = pytree.tree_leaves(nodes[-1].args)
    made = {node for node in results if isinstance(node, Node) and node.op == "call_function"}
    if spec is None or len(made) != len(results) or len(made) != spec.num_leaves:
        return None
    if spec.is_leaf():
        names = ["output"]
    elif spec.num_children != spec.num_leaves:
        return None
    else:
        keys = spec.context if isinstance(spec.context, list) else range(spec.num_children)
        names = [key if isinstance(key, str) else f"output_{key}" for key in keys]
    taken = {node.name for node in nodes if node.op == "placeholder"}
    return None if taken & set(names) else names


def _rename_others(model: Any) -> None:
    """A weight, or what an op makes, may have the name that an output was given."""
    import onnx_ir as ir

    outputs = {value.name: value for value in model.graph.outputs}
    made = [v for node in ir.traversal.RecursiveGraphIterator(model.graph) for v in node.outputs]
    others = [*model.graph.initializers.values(), *made]
    taken = {value.name for value in others} | outputs.keys()
    for value in others:
        if value is not outputs.get(value.name, value):
            while value.name in taken:
                value.name += "_"
            taken.add(value.name)


def _usual_axes(value: Any) -> dict[int, str]:
    """Axes of free size: the first is the batch; of token ids and masks the second the sequence;
    others go by their number.
    """
    text = len(value.shape) == 2 and value.dtype is not None and not value.dtype.is_floating_point()
    words = {0: "batch_size"} | ({1: "sequence_length"} if text else {})
    free = [dim for dim, size in enumerate(value.shape) if not isinstance(size, int)]
    return {dim: words.get(dim, f"axis_{dim}") for dim in free}


def _name_axes(model: Any, axes: Mapping[str, Mapping[int, str]]) -> None:
    """Give the sizes of the inputs' axes their names, everywhere in the graph. Another size of a
    usual name has that of its input before it.
    """
    import onnx_ir as ir

    named: dict[str, str] = {}
    for value in model.graph.inputs:
        own = re.sub(r"\W", "_", value.name)
        for dim, name in (axes.get(value.name, {}) if axes else _usual_axes(value)).items():
            taken = not axes and name in named.values()
            named.setdefault(str(value.shape[dim]), f"{own}_{name}" if taken else name)

    def told(size: Any) -> Any:
        if not isinstance(size, ir.SymbolicDim) or size.value is None:
            return size
        return re.sub(r"\w+", lambda m: named.get(m[0], m[0]), str(size.value))

    results = [value for node in model.graph for value in node.outputs]
    for value in (*model.graph.inputs, *results) if named else ():
        if value.shape is not None:
            value.shape = ir.Shape([told(size) for size in value.shape])


def onnx_session(path: str | os.PathLike[str]) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Args) -> list[Tensor]:
    """Outputs of a session on (args, kwargs) of the graph module that it was made of; floating
    point goes in as the session takes it.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    entries = session.get_inputs()
    if len(entries) != len(leaves):
        raise VerificationError(
            f"the ONNX model takes {len(entries)} inputs, the graph {len(leaves)} · help: leave "
            "out inputs that the model does not use"
        )
    feed = {}
    for entry, leaf in zip(entries, leaves, strict=True):
        value = leaf.half() if entry.type == "tensor(float16)" else leaf
        feed[entry.name] = value.cpu().numpy()
    return [torch.from_numpy(array) for array in session.run(None, feed)]


def _compare(module: GraphModule, inputs: Args, path: Path, form: Form) -> float:
    """ONNX Runtime equals the graph module at the example size and at another, if it is dynamic."""
    session, worst = onnx_session(path), 0.0
    cases: Sequence[Args] | Iterator[Args] | None = form.cases
    if cases is None:
        shapes = [entry.shape for entry in session.get_inputs()]
        cases = (inputs, *other_sizes(module, inputs, shapes))
    for case in cases:
        expected = outputs(module, case)
        actual = run_session(session, case)
        if len(actual) != len(expected):
            raise VerificationError(
                f"ONNX Runtime returns {len(actual)} outputs, the graph {len(expected)} · {REPORT}"
            )
        for k, (left, right) in enumerate(zip(expected, actual, strict=True)):
            worst = max(worst, _same(left.cpu(), right, k, form.dtype))
    return worst


def _same(left: Tensor, right: Tensor, output: int, dtype: str = "float32") -> float:
    """Their largest difference; VerificationError where it is too large."""
    if left.shape != right.shape:
        raise VerificationError(
            f"output {output}: ONNX Runtime gives shape {tuple(right.shape)}, the graph "
            f"{tuple(left.shape)} · {REPORT}"
        )
    if dtype == "int8":
        if not bool(torch.isfinite(right).all()):
            raise VerificationError(f"output {output} is not finite in int8 · help: another dtype")
        return difference(left, right)  # what it costs is measured, by perplexity
    half = torch.float16 in (left.dtype, right.dtype) or left.dtype == torch.bfloat16
    tolerance = 2e-2 if half else 5e-4
    left, right = left.double(), right.double()
    scale = max(1.0, float(left.abs().max())) if left.numel() else 1.0
    if not torch.allclose(left, right, rtol=0, atol=tolerance * scale, equal_nan=True):
        worst = float((left - right).abs().max()) / scale
        raise VerificationError(
            f"output {output}: ONNX Runtime and the graph differ by {worst:.1e} (allowed "
            f"{tolerance:.0e}); nothing was written · {REPORT}"
        )
    return difference(left, right)
