"""tracing: what a model's forward does around the numbers, made harmless while it is exported.

self.router.to(self.dtype)       a cast to what the weights are already changes nothing
int(self.stride), a buffer       a whole number that sizes are computed from is a constant
lengths.tolist()                 what is computed from constants is one (inputs: passes/held.py)
flex_attention(...)              compiles itself: with dynamic sizes, whatever it saw before
log lines, printed graphs        silenced: where torch.export fails, the error says enough
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .skeleton import has_numbers
from .state import steady

CONSTANTS = 1 << 16  # elements of a tensor of constants whose numbers the trace may use


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """The context in which torch.export runs."""
    from torch._dynamo import config as dynamo_config
    from torch._subclasses import fake_tensor
    from torch.fx.experimental import proxy_tensor

    _forget_flex()
    cast = nn.Module.to
    limits = [(module, module.CONSTANT_NUMEL_LIMIT) for module in (fake_tensor, proxy_tensor)]
    for module, _ in limits:
        module.CONSTANT_NUMEL_LIMIT = CONSTANTS  # type: ignore[attr-defined]
    nn.Module.to = _cast_once(cast)  # type: ignore[method-assign]
    try:
        sizes = dynamo_config.patch(assume_static_by_default=False)
        with silenced(), contextlib.redirect_stderr(io.StringIO()), sizes:
            yield
    finally:
        nn.Module.to = cast  # type: ignore[method-assign]
        for module, limit in limits:
            module.CONSTANT_NUMEL_LIMIT = limit  # type: ignore[attr-defined]


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what torch logs of code that it cannot trace or compile."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _forget_flex() -> None:
    """Drops what flex_attention has compiled: each piece would be tried on the sizes of this trace,
    and a piece for one size would make them that size.
    """
    from torch._dynamo.eval_frame import reset_code

    loaded = sys.modules.get("torch.nn.attention.flex_attention")
    for held in loaded.flex_attention.__code__.co_consts if loaded else ():
        if isinstance(held, types.CodeType):
            reset_code(held)


def _written(
    forward: Callable[..., Any], model: nn.Module, args: Any, whole: list[tuple[nn.Module, str]]
) -> set[tuple[nn.Module, str]]:
    """Which of the buffers `whole` a call changes."""
    if not whole or not has_numbers(model):
        return set()
    before = [module._buffers[name] for module, name in whole]
    versions = [held._version for held in before]  # type: ignore[union-attr]
    given = pytree.tree_map(lambda v: v.clone() if isinstance(v, Tensor) else v, args)
    with steady(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
        with contextlib.suppress(Exception):  # torch.export will say it with the line
            forward(*given[0], **given[1])
        after = [module._buffers[name] for module, name in whole]
        return {
            place
            for place, was, version, held in zip(whole, before, versions, after, strict=True)
            if held is not was or held._version != version  # type: ignore[union-attr]
        }


def _cast_once(cast: Callable[..., Any]) -> Callable[..., Any]:
    """Module.to that leaves a module alone whose tensors are what is asked for: traced parameters
    cannot be exchanged.
    """

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        held = [*self.parameters(), *self.buffers()]
        same = all(device is None or t.device == device for t in held)
        if same and all(dtype is None or t.dtype == dtype or not real_or_complex(t) for t in held):
            return self
        return cast(self, *args, **kwargs)

    return to


def real_or_complex(tensor: Tensor) -> bool:
    """Whether the numbers are no integers."""
    return tensor.is_floating_point() or tensor.is_complex()


def with_whole_numbers(
    forward: Callable[..., Any], model: nn.Module, args: Any
) -> Callable[..., Any]:
    """`forward` that finds the integers which `model` holds as buffers without a dim, and does not
    write, as constants of the trace, so that sizes computed from them are numbers.
    """
    whole = [
        (module, name)
        for module in model.modules()
        for name, held in module._buffers.items()
        if held is not None and held.dim() == 0 and not real_or_complex(held) and not held.is_meta
    ]
    written = _written(forward, model, args, whole)
    numbers = [
        (module, name, module._buffers[name].item(), module._buffers[name].dtype)  # type: ignore
        for module, name in whole
        if (module, name) not in written
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
