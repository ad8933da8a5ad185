"""lazy: a weight that is a promise. It is read when an op needs its numbers, and forgotten after.

    Lazy(shape, dtype, read)          read() -> the tensor of that shape and dtype
    f(Lazy) for a move or a cast f    Lazy(f.shape, f.dtype, f after read)
    f(Lazy) for any other op          f(read())

A model whose parameters are lazy runs, is captured, rewritten, compared and saved like any other,
and holds one weight at a time. Its parameters cannot be written to: a new value is a new parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten
Read = Callable[[], Tensor]
_SAME = {aten.detach.default, aten.alias.default, aten.clone.default}  # none can be written to
_DEFERRED = {
    aten.gather.default,
    aten.index_copy.default,
    aten.index_select.default,
}


class Lazy(Tensor):
    """A tensor without storage. `read` is called for every op that needs the numbers. `mark`
    says where they come from, so that two promises can be compared without reading; may be ''.
    """

    read: Read
    mark: str
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        shape: Iterable[int],
        dtype: torch.dtype,
        read: Read,
        mark: str = "",
        device: torch.device | str = "cpu",
    ) -> Lazy:
        """A promise of `shape` and `dtype` on a device."""
        made = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=device)
        made.read, made.mark = read, mark
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _SAME:
            return _like(args[0])
        if func is aten._to_copy.default and kwargs.keys() <= {"dtype", "memory_format"}:
            dtype = kwargs.get("dtype") or args[0].dtype
            cast = args[0]
            return Lazy(cast.shape, dtype, lambda: materialized(cast).to(dtype), device=cast.device)
        if func is aten.new_zeros.default:
            dtype, size = kwargs.get("dtype") or args[0].dtype, tuple(args[1])
            place = args[0].device
            return Lazy(
                size, dtype, lambda: torch.zeros(size, dtype=dtype, device=place), device=place
            )
        if func in _DEFERRED:
            return _later(func, args, kwargs)
        if func._schema.is_mutable and isinstance(args[0], Lazy):
            raise RuntimeError(f"{func} cannot write to a lazy weight; give a new parameter")
        return func(*pytree.tree_map(materialized, args), **pytree.tree_map(materialized, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Lazy:
        if id(self) not in memo:
            held = _like(self)
            memo[id(self)] = parameter(held, self) if isinstance(self, nn.Parameter) else held
        return memo[id(self)]  # type: ignore[no-any-return]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Lazy({tuple(self.shape)}, {self.dtype})"


def _like(held: Lazy) -> Lazy:
    return Lazy(held.shape, held.dtype, held.read, held.mark, held.device)


def _later(func: Any, args: Any, kwargs: Any) -> Lazy:
    """The op's result, as a promise; its shape comes from the op on tensors without numbers."""

    def shell(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    options = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
    made = func(*pytree.tree_map(shell, args), **pytree.tree_map(shell, options))
    place = next(a.device for a in pytree.tree_leaves(args) if isinstance(a, Lazy))
    return Lazy(
        made.shape,
        made.dtype,
        lambda: func(*pytree.tree_map(materialized, args), **pytree.tree_map(materialized, kwargs)),
        device=place,
    )


def materialized(value: Any) -> Any:
    """The numbers of a lazy tensor; anything else as it is."""
    return value.read() if isinstance(value, Lazy) else value


def parameter(tensor: Tensor, like: Tensor) -> nn.Parameter:
    """`tensor` as a parameter that needs gradients where `like` does."""
    if isinstance(tensor, nn.Parameter):
        return tensor
    return nn.Parameter(tensor, requires_grad=like.requires_grad)


def is_lazy(model: nn.Module) -> bool:
    """Whether a parameter of the model is a promise."""
    return any(isinstance(held, Lazy) for held in model.parameters())


def replace(model: nn.Module, change: Callable[[str, nn.Parameter], Tensor | None]) -> None:
    """Every parameter for which `change(its first name, it)` gives a tensor becomes that tensor,
    in place and under all its names.
    """
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # the old one is held: its id is a key
    for path, module in model.named_modules():
        for leaf, held in list(module._parameters.items()):
            if held is None:
                continue
            if id(held) not in made:
                new = change(f"{path}.{leaf}" if path else leaf, held)
                made[id(held)] = (held, held if new is None else parameter(new, held))
            module._parameters[leaf] = made[id(held)][1]
