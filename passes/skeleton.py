"""skeleton: models without numbers. Shapes are enough to find what goes together.

    skeleton(build)    run `build` so that parameters live on the meta device and take no memory
    fake_twin(model)   a copy whose parameters are fake CPU tensors, for torch.export

Buffers keep their numbers: index tables and rotary frequencies decide what a graph looks like.
Fake parameters on a fake CPU give the graph that real ones give; the meta device does not (other
branches of mask and attention code are taken there).
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

Model = TypeVar("Model", bound=nn.Module)


def has_numbers(model: nn.Module) -> bool:
    """Whether every parameter is more than a shape."""
    return not any(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())


def skeleton(build: Callable[[], Model]) -> Model:
    """The model that `build` makes, with all parameters on the meta device."""
    with _unallocated(), _EmptyOnMeta():
        model = build()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:  # made by torch.empty: held no numbers
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
    return model


@contextmanager
def _unallocated() -> Iterator[None]:
    """Every parameter that a module registers is replaced by one on the meta device."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class _EmptyOnMeta(TorchFunctionMode):
    """torch.empty, the usual first step of a large parameter, takes no memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def fake_twin(model: nn.Module) -> nn.Module:
    """A copy with fake CPU parameters and buffers, one per identity, so that ties stay."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    twin = shared_copy(model)
    made: dict[int, Any] = {}

    def fake(tensor: Tensor, parameter: bool) -> Any:
        if id(tensor) not in made:
            with mode:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            made[id(tensor)] = nn.Parameter(empty, requires_grad=False) if parameter else empty
        return made[id(tensor)]

    for module in twin.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = fake(value, True)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer, static_shapes=True)
    return twin


def shared_copy(model: Model, buffers: bool = False) -> Model:
    """A deep copy that shares the parameters, and the buffers if asked, and owns all else."""
    memo: dict[int, Any] = {id(p): p for p in model.parameters()}
    if buffers:
        memo |= {id(b): b for b in model.buffers()}
    for module in model.modules():  # a dozen tables each, mostly empty, which deepcopy is slow on
        for held in vars(module).values():
            if type(held) in (dict, OrderedDict, set) and not held:
                memo[id(held)] = type(held)()
    return copy.deepcopy(model, memo)


def restore_buffers(module: nn.Module, model: nn.Module) -> None:
    """Put the numbers of `model`'s buffers back in place of `module`'s fake ones."""
    real = dict(model.named_buffers())
    for path, buffer in list(module.named_buffers()):
        if isinstance(buffer, FakeTensor) and path in real:
            owner = module.get_submodule(path.rpartition(".")[0])
            owner._buffers[path.rpartition(".")[2]] = real[path].clone()
