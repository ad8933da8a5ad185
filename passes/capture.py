"""capture: model + example inputs -> one cleaned torch.fx graph whose numbers equal the model's.

torch.export, non-strict, under no_grad, on a copy in eval mode, without caches and with experts as
batched matrix products. Integer inputs (tokens, masks) are dynamic in every axis, other inputs in
the first; what the model specialises is taken as it is. The result is accepted only if it equals
eager at the sample size and, where an axis stayed dynamic, at twice that size.

Parameters without numbers (meta or fake) are captured as fake CPU tensors: the same graph, to be
analysed but not run; then nothing can be compared, and all axes are static.
"""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from .clean import clean
from .composed import take_apart
from .constants import mark_literals
from .errors import CaptureError
from .free_axes import Args, attempts, enlarged, free_axes
from .held import assert_constants, assert_held, holdable, with_held
from .lazy import is_lazy, replace
from .normalize import normalize
from .precision import is_half, widened, widened_inputs
from .refuse import depends_on_data, explain, refuse
from .skeleton import fake_twin, has_numbers, restore_buffers, shared_copy
from .tracing import traceable, with_whole_numbers
from .visit import op_name
from .vmapped import unbatch

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative to the largest output
HALF = 2e-2
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
    torch.export accepted (None: static); `compared`: its numbers were seen to equal the model's.
    """

    graph_module: GraphModule
    inputs: Args
    dynamic_shapes: Any
    compared: bool = True


def as_args(inputs: Any) -> Args:
    """A tensor, a tuple (positional) or a mapping (keyword) as (args, kwargs) of fresh
    contiguous tensors.
    """
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
    failure: Exception | None = None
    spare, branches = None, False
    for asked in asking:
        if branches and asked is not None:
            continue  # where numbers decide, other sizes do not help
        try:
            found = _export(model, args, asked)
        except Exception as error:  # torch.export raises errors of many unrelated types
            failure = error
            branches = branches or depends_on_data(error)
        else:
            if not _reads_sizes(found.graph_module):
                return found
            spare, branches = spare or found, True
    for held in holdable(args) if branches and shapes is None else ():
        with contextlib.suppress(Exception):
            found = _export(model, args, None, held)
            if not _reads_sizes(found.graph_module):
                return found
    if spare is None:
        assert failure is not None
        raise CaptureError(explain(model, failure)) from failure
    return spare


def _reads_sizes(module: GraphModule) -> bool:
    """Whether sizes in the graph are read from the numbers in a tensor."""
    return any(op_name(node) in ("item", "_local_scalar_dense") for node in module.graph.nodes)


def _export(
    model: nn.Module, args: Args, shapes: Any, held: frozenset[int] | None = None
) -> Captured:
    """`held`: integer inputs to take for constants, beside all that is made of none."""
    args = pytree.tree_map(_fresh, args)  # torch.export writes what it asked for onto tensors
    compared = has_numbers(model)
    real = compared and not is_lazy(model)
    twin = _prepared(copy.deepcopy(model) if real else fake_twin(model), args, held)
    with torch.no_grad(), traceable():
        program = torch.export.export(twin, *args, dynamic_shapes=shapes, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    free = free_axes(module, args)
    mark_literals(module)
    module = normalize(clean(take_apart(unbatch(module))))
    assert_held(module, args, held or frozenset())
    assert_constants(module, args)
    if not real:
        restore_buffers(module, model)
    if compared and not real:
        own = dict(model.named_parameters(remove_duplicate=False))
        replace(module, lambda name, _: own.get(name))
    if compared:
        _compare(module, model, args, free)
    return Captured(module, args, shapes if free else None, compared)


def _prepared(twin: nn.Module, args: Args, held: frozenset[int] | None) -> nn.Module:
    """`twin` as it is exported: eval mode, no cache, no fused experts, plain outputs."""
    twin.eval()
    for module in twin.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", None) is True:
            config.use_cache = False
    experts = getattr(twin, "set_experts_implementation", None)
    if callable(experts):
        experts("batched_mm")
    attention = getattr(getattr(twin, "config", None), "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa") and hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation("sdpa")
    forward = _without_cache(twin.forward, args)
    signature = inspect.signature(forward)
    forward = with_whole_numbers(forward, twin)
    forward = forward if held is None else with_held(forward, args, held)

    @functools.wraps(twin.forward)
    def plain_forward(*positional: Any, **keyword: Any) -> Any:
        return plain(forward(*positional, **keyword))

    plain_forward.__signature__ = signature  # type: ignore[attr-defined]
    twin.forward = plain_forward  # type: ignore[method-assign]
    return twin


def _without_cache(forward: Callable[..., Any], args: Args) -> Callable[..., Any]:
    """`forward` with use_cache=False, where it has the option and the caller left it open."""
    signature = inspect.signature(getattr(forward, "forward", forward))
    names = list(signature.parameters)
    if "use_cache" not in names or "use_cache" in args[1]:
        return forward
    if names.index("use_cache") < len(args[0]):
        return forward
    return functools.partial(forward, use_cache=False)


def plain(output: Any) -> Any:
    """Outputs that torch.export cannot return (dataclasses, objects) as dicts and tensors."""
    if isinstance(output, Tensor) or output is None:
        return output
    if type(output) in pytree.SUPPORTED_NODES:
        leaves, spec = pytree.tree_flatten(
            output,
            is_leaf=lambda item: item is not output and type(item) not in pytree.SUPPORTED_NODES,
        )
        return pytree.tree_unflatten([plain(leaf) for leaf in leaves], spec)
    if is_dataclass(output) and not isinstance(output, type):
        return {f.name: plain(getattr(output, f.name)) for f in fields(output)}
    return output if isinstance(output, (int, float, bool, str)) else None


def _compare(module: GraphModule, model: nn.Module, args: Args, free: dict[int, list[int]]) -> None:
    """Equal numbers at the sample size and, where axes stayed dynamic, at twice that size."""
    reference = shared_copy(model).eval()
    for factor in (1, 2) if free else (1,):
        sizes = enlarged(args, factor, free)
        given = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, sizes)
        try:
            expected = outputs(_without_cache(reference, sizes), sizes)
        except Exception:
            if factor == 1:
                raise
            return  # the model itself refuses that size (a table of positions ends, say)
        if not all(map(_equal, tensors(given), tensors(sizes))):
            raise CaptureError(
                "the model writes into its inputs, which a graph does not repeat · help: clone "
                "them at the start of forward"
            )
        if not _all_equal(expected, outputs(module, sizes)) and not _equal_when_wide(
            module, reference, sizes
        ):
            raise CaptureError(
                f"the captured graph computes other numbers than the model, at {factor} times the "
                "sample size · help: take out what forward draws at random or remembers from call "
                "to call, or report it with the model"
            )


def _equal_when_wide(module: GraphModule, model: nn.Module, args: Args) -> bool:
    """Whether the difference was rounding of half precision: in float32 there is none."""
    if not is_half(model):
        return False
    wide, given = widened(model), widened_inputs(args)
    try:
        expected = outputs(_without_cache(wide, given), given)
    except Exception:  # code that insists on a precision
        return False
    return _all_equal(expected, outputs(widened(module), given))


def _all_equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(_equal(a, b) for a, b in zip(left, right, strict=True))


def outputs(call: Callable[..., Any], args: Args) -> list[Tensor]:
    """All tensors that a call gives, without gradients; what it draws at random is always alike."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors(call(*args[0], **args[1]))


def _equal(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    if not left.is_floating_point():
        return torch.equal(left, right)
    tolerance = TOLERANCE.get(left.dtype, HALF)
    left, right = left.double(), right.double()
    same = (left == right) | (left.isnan() & right.isnan())  # infinities as well
    scale = max(1.0, float(left[left.isfinite()].abs().max())) if left.isfinite().any() else 1.0
    return bool((same | ((left - right).abs() <= tolerance * scale)).all())


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output, in order; complex numbers as their two parts."""
    found = [leaf for leaf in pytree.tree_leaves(plain(output)) if isinstance(leaf, Tensor)]
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in found]
