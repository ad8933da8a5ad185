"""current: the compact graph on the weights that the class holds now.

The class is what a user trains, loads weights into and moves; the graph is what is exported. After
`prune` both stand on the same storage, so that what is trained in place is in both. Where it is not
(a copy was trained, the class was moved to another precision, its layers were wrapped), the
class decides: the graph takes its weights, or, if that does not compute what the class does, the
class is captured anew.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args, Captured, beside, capture
from passes.compare import outputs, without_cache
from passes.lazy import Lazy, is_lazy, replace
from passes.precision import HALF
from passes.rewrite import attribute
from passes.skeleton import shared_copy
from passes.verify import difference


def stored(model: nn.Module, name: str) -> Tensor | None:
    """A tensor of the compact model; compact too where a parametrisation pads it. None if the model
    has none of that name.
    """
    path, _, leaf = name.rpartition(".")
    try:
        table = getattr(model.get_submodule(path), "parametrizations", {})
        value = table[leaf].original if leaf in table else attribute(model, name)
    except AttributeError:
        return None
    return value if isinstance(value, Tensor) else None


def share(graph: GraphModule, model: nn.Module, wrapper: str = "") -> None:
    """Parameters that hold what those of `model` do stand on its storage (in place). `wrapper`:
    what the names of the graph have before those of the model.
    """

    def theirs(name: str, held: nn.Parameter) -> Tensor | None:
        found = stored(model, name.removeprefix(wrapper))
        if found is None or (found.dtype, found.device) != (held.dtype, held.device):
            return None
        lazy = isinstance(found, Lazy) or isinstance(held, Lazy)
        return found.detach() if not lazy and torch.equal(found, held) else None

    replace(graph, theirs)


def current(graph: GraphModule, model: nn.Module, inputs: Args, dynamic_shapes: object) -> Captured:
    """The program of `model` as it is: `graph` on its weights, or else captured anew; CaptureError
    where that cannot be done.
    """
    if is_lazy(model):  # promises are not trained
        return Captured(graph, inputs, dynamic_shapes)
    found = _on_weights(graph, model)
    if found is not None and _same(found, model, inputs):
        return Captured(found, inputs, dynamic_shapes)
    args, kwargs = _in_precision(model, graph, inputs)
    return capture(model, kwargs or args)


def _on_weights(graph: GraphModule, model: nn.Module) -> GraphModule | None:
    """`graph` on the weights and buffers of `model`; None where one is missing, or of another
    shape or type.
    """
    made = shared_copy(graph)
    misfits = []

    def theirs(name: str, held: nn.Parameter) -> Tensor | None:
        found = stored(model, name)
        if found is None or (found.shape, found.dtype) != (held.shape, held.dtype):
            misfits.append(name)
            return None
        return found.detach().to(held.device)

    replace(made, theirs)
    for name, buffer in list(made.named_buffers()):
        found = stored(model, name)
        if found is not None and (found.shape, found.dtype) == (buffer.shape, buffer.dtype):
            path, _, leaf = name.rpartition(".")
            made.get_submodule(path)._buffers[leaf] = found.detach().to(buffer.device)
    return None if misfits else made


def _same(graph: GraphModule, model: nn.Module, inputs: Args) -> bool:
    """Whether both give the same numbers at `inputs`."""
    reference, there = shared_copy(model).eval(), beside(model, inputs)
    try:
        expected = outputs(without_cache(reference, there), there)
        found = outputs(graph, inputs)
    except Exception:  # whatever either refuses, capturing the class says it better
        return False
    return len(found) == len(expected) and all(
        difference(a.cpu(), b.cpu()) <= (2e-2 if a.dtype in HALF else 5e-4)
        for a, b in zip(expected, found, strict=True)
    )


def _in_precision(model: nn.Module, graph: GraphModule, inputs: Args) -> Args:
    """The inputs of `graph` as those of a model that was moved to another precision."""
    ours, theirs = (
        next((p.dtype for p in module.parameters() if p.is_floating_point()), None)
        for module in (graph, model)
    )
    return pytree.tree_map(
        lambda v: v.to(theirs) if isinstance(v, Tensor) and v.dtype == ours else v, inputs
    )
