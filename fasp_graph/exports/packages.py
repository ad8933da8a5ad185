"""packages: the compact graph as a .pt2 file that needs torch alone.

save_pt2     a torch.export program, for any machine     torch.export.load(path).module()
save_aoti    machine code by AOTInductor, for this kind of machine; needs a C++ compiler
                                                  torch._inductor.aoti_load_package(path)

The graph is captured again, written, loaded and compared, at the example and at another size.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args
from passes.compare import outputs
from passes.errors import FaspGraphError, VerificationError
from passes.verify import difference

from ..folders.drafts import draft
from .other_sizes import other_sizes
from .program import program_of, quiet

COMPILERS = ("c++", "g++", "clang++")


def save_pt2(module: GraphModule, inputs: Args, dynamic_shapes: Any, path: Path) -> float:
    """Write a captured graph by torch.export.save; VerificationError if it computes other
    numbers when loaded. Returns the largest relative difference.
    """
    with draft(path, "pt2", ".pt2") as made, torch.no_grad():
        program = _anonymous(program_of(module, inputs, dynamic_shapes))
        torch.export.save(program, made)
        return _compare(module, torch.export.load(made).module(), inputs, program)


def save_aoti(module: GraphModule, inputs: Args, dynamic_shapes: Any, path: Path) -> float:
    """Compile a captured graph for this machine; FaspGraphError where no C++ compiler is."""
    if not any(shutil.which(name) for name in COMPILERS):
        raise FaspGraphError(
            f"AOTInductor needs a C++ compiler, and none of {', '.join(COMPILERS)} is on PATH · "
            "help: format='pt2' needs none"
        )
    with draft(path, "an AOTInductor package", ".pt2") as made, torch.no_grad(), quiet():
        program = _anonymous(program_of(module, inputs, dynamic_shapes))
        torch._inductor.aoti_compile_and_package(program, package_path=str(made))
        return _compare(module, torch._inductor.aoti_load_package(str(made)), inputs, program)


def _anonymous(program: ExportedProgram) -> ExportedProgram:
    """Without stack traces (in place): half of a small file, and this machine's paths."""
    for graph in program.graph_module.modules():
        for node in graph.graph.nodes if isinstance(graph, GraphModule) else ():
            node.meta.pop("stack_trace", None)
    return program


def _compare(
    module: GraphModule, loaded: Callable[..., Any], inputs: Args, program: ExportedProgram
) -> float:
    worst = 0.0
    for args in (inputs, *other_sizes(module, inputs, _shapes(program))):
        expected, actual = outputs(module, args), outputs(loaded, args)
        for number, (left, right) in enumerate(zip(expected, actual, strict=True)):
            error = difference(left, right)
            worst = max(worst, error)
            allowed = 2e-2 if left.dtype in (torch.float16, torch.bfloat16) else 5e-4
            if not error <= allowed:
                raise VerificationError(
                    f"output {number}: the package and the graph differ by {error:.1e} (allowed "
                    f"{allowed:.0e}); nothing was written · help: format='onnx' may do; please "
                    "report it with the model"
                )
    return worst


def _shapes(program: ExportedProgram) -> list[list[Any]]:
    """Shapes of the inputs, dynamic axes by name."""
    given = set(program.graph_signature.user_inputs)
    values = [
        n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in given
    ]
    return [
        [size if isinstance(size, int) else str(size) for size in value.shape]
        for value in pytree.tree_leaves(values)
        if isinstance(value, torch.Tensor)
    ]
