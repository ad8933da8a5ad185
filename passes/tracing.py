"""tracing: what a model's forward does around the numbers, made harmless while it is exported.

self.router.to(self.dtype)       a cast to what the weights are already changes nothing
int(self.stride), a buffer       a whole number that sizes are computed from is a constant
lengths.tolist()                 what is computed from constants is one, and an integer input may be
                                 held as one (the sizes of images): the graph then refuses others
log lines, printed graphs        silenced: where torch.export fails, the error says enough
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .visit import op_name

aten = torch.ops.aten
CONSTANTS = 1 << 12  # elements of a tensor of constants whose numbers the trace may use
MAKING = {torch.arange, torch.zeros, torch.ones, torch.full, torch.div}
PLAIN = (int, float, str, torch.Size, torch.dtype, torch.device, torch.layout)
HOLDING = 3  # integer inputs that are held as constants at most


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """The context in which torch.export runs."""
    cast = nn.Module.to
    before = logging.root.manager.disable
    limits = [(module, module.CONSTANT_NUMEL_LIMIT) for module in (fake_tensor, proxy_tensor)]
    for module, _ in limits:
        module.CONSTANT_NUMEL_LIMIT = CONSTANTS  # type: ignore[attr-defined]
    logging.disable(logging.CRITICAL)
    nn.Module.to = _cast_once(cast)  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        nn.Module.to = cast  # type: ignore[method-assign]
        logging.disable(before)
        for module, limit in limits:
            module.CONSTANT_NUMEL_LIMIT = limit  # type: ignore[attr-defined]


def _cast_once(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Module.to that leaves a module alone whose tensors are what is asked for: traced parameters
    cannot be exchanged.
    """

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        held = [*self.parameters(), *self.buffers()]
        same = all(device is None or t.device == device for t in held)
        if same and all(dtype is None or t.dtype == dtype or not _real(t) for t in held):
            return self
        return cast(self, *args, **kwargs)

    return to


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def with_whole_numbers(forward: Callable[..., Any], model: nn.Module) -> Callable[..., Any]:
    """`forward` that finds the integers which `model` holds as buffers without a dim as constants
    of the trace, so that sizes computed from them are numbers.
    """
    numbers = [
        (module, name, held.item(), held.dtype)
        for module in model.modules()
        for name, held in module._buffers.items()
        if held is not None and held.dim() == 0 and not _real(held) and not held.is_meta
    ]

    def with_constants(*args: Any, **kwargs: Any) -> Any:
        before = [module._buffers[name] for module, name, _, _ in numbers]
        for module, name, number, dtype in numbers:
            module._buffers[name] = torch.tensor(number, dtype=dtype)
        try:
            return forward(*args, **kwargs)
        finally:
            for (module, name, _, _), held in zip(numbers, before, strict=True):
                module._buffers[name] = held

    return with_constants


def holdable(args: Any) -> list[frozenset[int]]:
    """Sets of integer inputs (by their position among the leaves) to hold as constants, the fewest
    and smallest first, from none on. Something else is left to vary.
    """
    leaves = pytree.tree_leaves(args)
    whole = [k for k, v in enumerate(leaves) if isinstance(v, Tensor) and not _real(v)]
    whole.sort(key=lambda k: (leaves[k].numel(), k))
    varied = any(isinstance(leaf, Tensor) and _real(leaf) for leaf in leaves)
    chosen = [k for k in (whole if varied else whole[:-1]) if leaves[k].numel() <= CONSTANTS]
    return [frozenset(chosen[:n]) for n in range(min(len(chosen), HOLDING) + 1)]


def with_held(forward: Callable[..., Any], args: Any, held: frozenset[int]) -> Callable[..., Any]:
    """`forward` that takes the integer inputs `held` for the constants that they are in `args`, and
    what it makes of numbers alone for constants as well.
    """
    leaves = pytree.tree_leaves(args)
    numbers = {k: (leaves[k].tolist(), leaves[k].dtype) for k in held}

    def with_constants(*positional: Any, **keyword: Any) -> Any:
        leaves, spec = pytree.tree_flatten((positional, keyword))
        for k, (values, dtype) in numbers.items():
            leaves[k] = torch.tensor(values, dtype=dtype, device=leaves[k].device)
        positional, keyword = pytree.tree_unflatten(leaves, spec)
        with _Made():
            return forward(*positional, **keyword)

    return with_constants


class _Made(TorchFunctionMode):
    """Tensors that are made of plain numbers (arange, ones) are constants of the trace."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [a for a in pytree.tree_leaves((args, kwargs)) if a is not None]
        if func in MAKING and all(isinstance(a, PLAIN) for a in given):
            with _disable_current_modes():
                made = func(*args, **kwargs)
            if made.numel() <= CONSTANTS:
                constant = torch.tensor(made.tolist(), dtype=made.dtype, device=made.device)
                return constant.reshape(made.shape)
        return func(*args, **kwargs)


def assert_held(module: GraphModule, args: Any, held: frozenset[int]) -> None:
    """Let the graph assert that the inputs `held` are what they are in `args` (in place)."""
    leaves = pytree.tree_leaves(args)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for k in sorted(held):
        name = f"_held_{inputs[k].name}"
        module.register_buffer(name, leaves[k].clone(), persistent=False)
        with module.graph.inserting_after(inputs[-1]):
            constant = module.graph.get_attr(name)
        with module.graph.inserting_after(constant):
            same = module.graph.call_function(aten.eq.Tensor, (inputs[k], constant))
        with module.graph.inserting_after(same):
            everywhere = module.graph.call_function(aten.all.default, (same,))
        with module.graph.inserting_after(everywhere):
            said = (
                f"{inputs[k].name} is not what it was in the example inputs, which is all that the "
                "graph was captured for: forward computes sizes from its numbers"
            )
            module.graph.call_function(aten._assert_async.msg, (everywhere, said))
        constant.meta["val"] = leaves[k]
        same.meta["val"] = leaves[k] == leaves[k]
        everywhere.meta["val"] = same.meta["val"].all()
    module.recompile()


def held_inputs(module: GraphModule) -> frozenset[int]:
    """Positions of the inputs that a captured graph asserts to be what they were."""
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]

    def asserted(node: Node) -> bool:
        return any(
            op_name(check) == "_assert_async"
            for same in node.users
            for everywhere in same.users
            for check in everywhere.users
        )

    return frozenset(k for k, node in enumerate(inputs) if asserted(node))
