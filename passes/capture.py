"""capture: model + example inputs -> one cleaned torch.fx graph whose numbers equal the model's.

torch.export, non-strict, under no_grad, on a copy in eval mode, without caches and with experts as
batched matrix products. Integer inputs (tokens, masks) are dynamic in every axis, other inputs in
the first; what the model specialises is taken as it is. The result is accepted only if it equals
eager at the sample size and, where an axis stayed dynamic, at twice that size. Where numbers decide
sizes or branches, integer inputs are held as constants (passes/held.py), then one way is taken at
each branch (passes/branches.py). Ops without a rule that torch composes of others are taken apart.

Parameters without numbers (meta or fake) are captured as fake CPU tensors: the same graph, to be
analysed but not run; then nothing can be compared, and all axes are static.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .bounds import assert_sizes
from .branches import Assumed
from .clean import clean
from .compare import compare, outputs, plain, without_cache
from .composed import take_apart
from .constants import mark_literals
from .control import has_steps, leave_control, open_control
from .errors import CaptureError
from .flex import open_flex
from .free_axes import Args, attempts, free_axes
from .held import assert_constants, assert_held, holdable, with_held
from .layouts import blocks_first
from .lazy import is_lazy, replace
from .normalize import normalize
from .refuse import (
    autocast_line,
    depends_on_data,
    explain,
    refuse,
    refuse_packed,
    under_autocast,
)
from .skeleton import fake_twin, has_numbers, restore_buffers, shared_copy
from .tracing import traceable, with_whole_numbers
from .visit import op_name
from .vmapped import unbatch
from .watch import alike, further, watched

# All leaves of torch's tree specs are one object, of a class that is deprecated to build anew. A
# graph holds its specs, so that a copy of a graph would build it: a copy of the leaf is the leaf.
_LEAF = type(pytree.tree_structure(0))
if _LEAF is not pytree.TreeSpec:
    copyreg.dispatch_table[_LEAF] = lambda _: (pytree.tree_structure, (0,))


@dataclass(frozen=True)
class Captured:
    """A captured program.

    `graph_module` holds parameters under the user's names (tied ones as one object) and is called
    like the model; `inputs` are the fresh copies it was captured with; `dynamic_shapes` is what
    torch.export accepted (None: static); `compared`: its numbers were seen to equal the model's;
    `branches`: lines where the model branches on numbers and the graph takes one way for both.
    """

    graph_module: GraphModule
    inputs: Args
    dynamic_shapes: Any
    compared: bool = True
    branches: tuple[str, ...] = ()


def as_args(inputs: Any) -> Args:
    """A tensor, a tuple (positional) or a mapping (keyword) as (args, kwargs) of fresh
    contiguous tensors; CaptureError for packed sequences.
    """
    refuse_packed(inputs)
    if isinstance(inputs, Mapping):
        args: Args = ((), dict(inputs))
    elif isinstance(inputs, (tuple, list)):
        args = (tuple(inputs), {})
    else:
        args = ((inputs,), {})

    return pytree.tree_map(_fresh, args)


def _fresh(value: Any) -> Any:
    return value.detach().clone().contiguous() if isinstance(value, Tensor) else value


def placed(held: Any, device: torch.device) -> Any:
    """`held` with its tensors on a device."""
    return pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, held)


def beside(model: nn.Module, args: Args) -> Args:
    """Tensors on the CPU moved to the model's accelerator, if it is on one."""
    devices = {held.device for held in (*model.parameters(), *model.buffers())}
    (device,) = devices if len(devices) == 1 else (None,)
    if device is None or device.type in ("cpu", "meta"):
        return args

    def move(leaf: Any) -> Any:
        return leaf.to(device) if isinstance(leaf, Tensor) and leaf.device.type == "cpu" else leaf

    return pytree.tree_map(move, args)


def capture(
    model: nn.Module, inputs: Any, dynamic: bool | None = None, shapes: Any = None
) -> Captured:
    """Capture `model` at `inputs`; CaptureError names the cause. The model is not changed.

    `dynamic`: whether to ask for dynamic axes; by default where parameters have numbers, so that
    another size can be tried (static capture takes half the time). `shapes`: the dynamic axes to
    ask for, in the form of torch.export; by default all that may be.
    """
    args = beside(model, as_args(inputs))
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(args)):
        raise CaptureError(
            "inputs hold no tensor · help: pass a tensor, a tuple or a dict of tensors"
        )
    refuse(model, args)
    dynamic = has_numbers(model) if dynamic is None else dynamic
    asking = list(attempts(model, args) if dynamic else (None,)) if shapes is None else [shapes]
    found, failure, decide = _at_sizes(model, args, asking)
    if decide and shapes is None:
        found = _with_constants(model, args) or found
    if found is None and has_numbers(model) and not is_lazy(model):
        with contextlib.suppress(Exception):  # `failure` says more
            found = _with_assumed(model, args, asking)
    if found is None:
        assert failure is not None
        raise CaptureError(explain(model, failure)) from failure
    return found


def _at_sizes(
    model: nn.Module, args: Args, asking: list[Any]
) -> tuple[Captured | None, Exception | None, bool]:
    """Captured as it is, with the first dynamic axes that may be; the last failure; whether numbers
    decide sizes or branches.
    """
    found, failure, decide = None, None, False
    for asked in asking:
        if decide and asked is not None:
            continue  # where numbers decide, other sizes do not help
        try:
            made = _export(model, args, asked)
        except Exception as error:  # torch.export raises errors of many unrelated types
            failure = error
            decide = decide or depends_on_data(error)
        else:
            reads = _reads_sizes(made.graph_module)
            if not reads and not has_steps(made.graph_module):
                return made, None, False
            found, decide = found or made, decide or reads
    return found, failure, decide


def _with_constants(model: nn.Module, args: Args) -> Captured | None:
    """Captured with integer inputs held as constants, if no size is then read from numbers."""
    for held in holdable(args):
        with contextlib.suppress(Exception):
            found = _export(model, args, None, held)
            if not _reads_sizes(found.graph_module):
                return found
    return None


def _with_assumed(model: nn.Module, args: Args, asking: list[Any]) -> Captured | None:
    """Captured with one way at every branch on numbers, if one serves."""
    reference = shared_copy(model).eval()
    watch, runs = watched(
        lambda run: outputs(without_cache(reference, run), run), [args, *alike(args)]
    )
    for asked in asking:
        differs = False
        for doing in (True, False) if watch.undecided else (True,):
            try:
                return _in_one_way(model, args, asked, Assumed(watch, doing, runs))
            except CaptureError:
                differs = True
            except Exception:  # torch.export raises errors of many unrelated types
                continue
        if differs:
            return None  # at other sizes as well
    return None


def _in_one_way(model: nn.Module, args: Args, asked: Any, assumed: Assumed) -> Captured:
    found = _export(model, args, asked, assumed=assumed)
    if _reads_sizes(found.graph_module):
        raise CaptureError("sizes are read from numbers · help: compute with tensors")
    if assumed.counted:  # another number of rows must make the same graph
        other = Assumed(assumed.watch, assumed.doing, assumed.runs, many=1)
        if _export(model, args, asked, assumed=other).graph_module.code != found.graph_module.code:
            raise CaptureError(
                "forward computes from the length of a selection · help: use shape, which is traced"
            )
    return dataclasses.replace(found, branches=assumed.lines)


def _reads_sizes(module: GraphModule) -> bool:
    """Whether sizes in the graph are read from the numbers in a tensor."""
    return any(op_name(node) in ("item", "_local_scalar_dense") for node in module.graph.nodes)


def _export(
    model: nn.Module,
    args: Args,
    shapes: Any,
    held: frozenset[int] | None = None,
    assumed: Assumed | None = None,
    whole: bool = False,
) -> Captured:
    """`held`: integer inputs to take for constants, beside all that is made of none. `assumed`:
    which way to take where numbers decide. `whole`: whether calls of control flow stay calls.
    """
    args = pytree.tree_map(_fresh, args)  # torch.export writes what it asked for onto tensors
    compared = has_numbers(model)
    real = compared and not is_lazy(model)
    twin = _prepared(copy.deepcopy(model) if real else fake_twin(model), args, held, assumed)
    with torch.no_grad(), traceable():
        program = torch.export.export(twin, *args, dynamic_shapes=shapes, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    free, mixed = free_axes(module, args), autocast_line(module)
    mark_literals(module)
    opened = not whole and open_control(module)
    if whole:
        leave_control(module)
    module = normalize(clean(take_apart(open_flex(unbatch(module)))))
    module = blocks_first(module, args)
    assert_held(module, args, held or frozenset())
    assert_constants(module, args)
    if not real:
        _restore(module, model)
    assert_sizes(module, model.forward, args, program._guards_code)
    if compared:
        runs = [*assumed.runs, *further(args)] if assumed else []
        try:
            compare(module, model, args, free, runs)
        except Exception as error:
            if opened:
                return _export(model, args, shapes, held, assumed, whole=True)
            if mixed:
                raise CaptureError(under_autocast(mixed)) from error
            raise
    return Captured(module, args, shapes if free else None, compared)


def _restore(module: GraphModule, model: nn.Module) -> None:
    """Put what the model holds in place of what is fake."""
    restore_buffers(module, model)
    if has_numbers(model):
        own = dict(model.named_parameters(remove_duplicate=False))
        replace(module, lambda name, _: own.get(name))


def _prepared(
    twin: nn.Module, args: Args, held: frozenset[int] | None, assumed: Assumed | None
) -> nn.Module:
    """`twin` as it is exported: eval mode, no cache, no fused experts, plain outputs."""
    twin.eval()
    for module in twin.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
        experts = getattr(module, "set_experts_implementation", None)
        if callable(experts):
            experts("batched_mm")
        attention = getattr(config, "_attn_implementation", None)
        if attention not in (None, "eager", "sdpa") and hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation("sdpa")
    forward = without_cache(twin.forward, args)
    signature = inspect.signature(forward)
    forward = with_whole_numbers(forward, twin, args)
    forward = forward if held is None else with_held(forward, args, held)
    forward = forward if assumed is None else assumed(forward)

    @functools.wraps(twin.forward)
    def plain_forward(*positional: Any, **keyword: Any) -> Any:
        return plain(forward(*positional, **keyword))

    plain_forward.__signature__ = signature  # type: ignore[attr-defined]
    twin.forward = plain_forward  # type: ignore[method-assign]
    return twin
