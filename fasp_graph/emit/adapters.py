"""adapters: modules between a compact weight and code that has the old size burned in.

They stand at a module's interface. Where another module that holds it takes its place in its
parent (a LoRA layer of PEFT around a linear layer), or it comes back from there (merge_and_unload),
they move along: what lies inside is compact, so that low-rank factors have the weight's own shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

Axis = tuple[int, int, tuple[int, ...]]  # axis, its size before, kept positions


class Scatter(nn.Module):
    """Forward hook: an output of the kept width -> the old width, zeros where units are gone."""

    def __init__(self, axis: int, size: int, kept: Iterable[int], device: Any) -> None:
        super().__init__()
        held = torch.tensor(tuple(kept), dtype=torch.long)
        places = torch.full((size,), len(held))  # removed ones point at a zero that is appended
        places[held] = torch.arange(len(held))
        self.axis = axis
        self.register_buffer("places", places.to(device), persistent=False)

    def forward(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        """[..., kept] -> [..., size]."""
        zero = torch.zeros_like(output.narrow(self.axis, 0, 1))
        return torch.cat([output, zero], self.axis).index_select(self.axis, self.places)


class Gather(nn.Module):
    """Forward pre-hook: an input of the old width -> its kept positions."""

    def __init__(self, axis: int, kept: Iterable[int], device: Any) -> None:
        super().__init__()
        self.axis = axis
        held = torch.tensor(tuple(kept), dtype=torch.long, device=device)
        self.register_buffer("kept", held, persistent=False)

    def forward(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """[..., size] -> [..., kept]."""
        return (args[0].index_select(self.axis, self.kept), *args[1:])


class Padding(nn.Module):
    """Parametrisation: a compact tensor -> the old shape, zeros where units are gone."""

    def __init__(self, axes: Iterable[Axis], device: Any) -> None:
        super().__init__()
        self.sizes = tuple((axis, size) for axis, size, _ in axes)
        for number, (_, _, kept) in enumerate(axes):
            held = torch.tensor(tuple(kept), dtype=torch.long, device=device)
            self.register_buffer(f"kept_{number}", held, persistent=False)

    def forward(self, compact: Tensor) -> Tensor:
        """Kept sizes -> old sizes, one axis after the other."""
        for number, (axis, size) in enumerate(self.sizes):
            shape = [*compact.shape[:axis], size, *compact.shape[axis + 1 :]]
            held = self.get_buffer(f"kept_{number}")
            compact = compact.new_zeros(shape).index_copy(axis, held, compact)
        return compact


SLOTS = ("_fasp_scatter", "_fasp_gather")


def attach(module: nn.Module, adapter: Scatter | Gather) -> None:
    """`adapter` becomes a child of `module`, so that it moves between devices, and its hook."""
    if isinstance(adapter, Scatter):
        module._fasp_scatter = adapter
        module.register_forward_hook(adapter)
    else:
        module._fasp_gather = adapter
        module.register_forward_pre_hook(adapter)


def _follow(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    """Registration hook: adapters of the module that leaves its place go to the one that comes."""
    old = parent._modules.get(name)
    if new is None or old is None or new is old:
        return
    held = [a for slot in SLOTS if isinstance(a := old._modules.get(slot), (Scatter, Gather))]
    if not held or not (_holds(new, old) or _holds(old, new)):
        return
    for adapter in held:
        _detach(old, adapter)
        attach(new, adapter)


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _detach(module: nn.Module, adapter: nn.Module) -> None:
    for slot in SLOTS:
        if module._modules.get(slot) is adapter:
            del module._modules[slot]
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        for key in [key for key, hook in hooks.items() if hook is adapter]:
            del hooks[key]


register_module_module_registration_hook(_follow)
