"""microbatch: calibration batches in pieces that fit into a budget of memory.

    bytes of all live values, of one piece at any node <= max_memory / 2

The other half is for those of the pieces that wait; Spill keeps these within bounds. Batches are
cut along their first axis, and only if the model treats its positions apart: run on one row of the
example inputs, it must give that row of the outputs. Statistics are sums, so pieces change them
by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes.capture import Args, Captured
from passes.compare import outputs
from passes.observe import last_reads
from passes.precision import widened, widened_inputs
from passes.rewrite import attribute
from passes.verify import difference

from .spill import held_bytes

aten = torch.ops.aten
SAME = 1e-4  # relative; rounding of another batch size


def microbatches(captured: Captured, batches: list[Args], max_memory: int | None) -> list[Args]:
    """The batches, cut where they must be and may be."""
    if max_memory is None or not batches or not rows_apart(captured):
        return batches
    found: list[Args] = []
    for batch in batches:
        need = working_set(captured.graph_module, batch)
        pieces = min(math.ceil(need / max(1, max_memory // 2)), rows_of(batch) or 1)
        found += cut(batch, pieces)
    return found


def working_set(module: GraphModule, args: Args) -> int:
    """Largest bytes of activations that live at one node, found without numbers: where these
    decide how many places are chosen, of all places.
    """
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    given = iter(pytree.tree_leaves(args))
    values: dict[Node, Any] = {}
    weights: dict[Node, Any] = {}
    over, largest = last_reads(module), 0
    with torch.no_grad(), fakes, _Everywhere():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                values[node] = pytree.tree_map(_faked(fakes), next(given))
            elif node.op == "get_attr":
                weights[node] = _faked(fakes)(attribute(module, str(node.target)))
            elif node.op == "call_function":
                args_, kwargs = pytree.tree_map(
                    lambda a: (
                        (weights if a in weights else values)[a] if isinstance(a, Node) else a
                    ),
                    (node.args, node.kwargs),
                    is_leaf=lambda a: isinstance(a, Node),
                )
                values[node] = node.target(*args_, **kwargs)
                largest = max(largest, held_bytes(values.values()))
                for value in over.get(node, ()):
                    values.pop(value, None)
    return largest


class _Everywhere(TorchDispatchMode):
    """Choices by the numbers in a tensor choose all places."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten.nonzero.default:
            return _places(args[0])
        if func is aten.index.Tensor:
            held = [_places(i).unbind(1) if _is_mask(i) else [i] for i in args[1]]
            args = (args[0], [index for several in held for index in several])
        return func(*args, **(kwargs or {}))


def _places(mask: Tensor) -> Tensor:
    return mask.new_empty(mask.numel(), mask.dim(), dtype=torch.long)


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype == torch.bool


def _faked(fakes: FakeTensorMode) -> Any:
    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return fakes.from_tensor(value)
        return torch.empty(value.shape, dtype=value.dtype, device=value.device)

    return fake


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]


def rows_of(args: Args) -> int | None:
    """The size of the first axis that all tensors share."""
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in _tensors(args)}
    return sizes.pop() if len(sizes) == 1 else None


def rows_apart(captured: Captured) -> bool:
    """Whether the first row alone gives the first row of the outputs."""
    rows = rows_of(captured.inputs)
    if captured.dynamic_shapes is None or rows is None or rows < 2:
        return False
    inputs, module = widened_inputs(captured.inputs), widened(captured.graph_module)
    first = cut(inputs, rows)[0]
    try:
        alone = outputs(module, first)
    except RuntimeError:  # sizes that the capture specialised
        return False
    together = outputs(module, inputs)
    return all(
        whole.dim() > 0 and len(whole) == rows and difference(whole[:1], one) <= SAME
        for whole, one in zip(together, alone, strict=True)
    )


def cut(args: Args, pieces: int) -> list[Args]:
    """Pieces of nearly equal numbers of rows."""
    if pieces < 2:
        return [args]
    leaves, spec = pytree.tree_flatten(args)
    cut = [
        leaf.tensor_split(pieces) if isinstance(leaf, Tensor) else [leaf] * pieces
        for leaf in leaves
    ]
    return [pytree.tree_unflatten(list(piece), spec) for piece in zip(*cut, strict=True)]
