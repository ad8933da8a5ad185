"""adapters: modules between a compact weight and code that has the old size burned in.

They stand at a module's interface. Where another module that holds it takes its place in its
parent (a LoRA layer of PEFT around a linear layer), or it comes back from there (merge_and_unload),
they move along: what lies inside is compact, so that low-rank factors have the weight's own shape.
Copies of the module that the newcomer trains instead (modules_to_save) become bare likewise.
Low-rank factors beside a padded weight are refused: they would have the old shape, bring removed
units back, and be lost when they are merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from passes.errors import FaspGraphError

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
    _refuse_padded(name, old, new)
    held = [a for slot in SLOTS if isinstance(a := old._modules.get(slot), (Scatter, Gather))]
    if not held or not (_holds(new, old) or _holds(old, new)):
        return
    copies = [module for module in new.modules() if type(module) is type(old)]
    for adapter in held:
        for module in (old, *copies):
            _detach(module, adapter)
        attach(new, adapter)


def _refuse_padded(name: str, old: nn.Module, new: nn.Module) -> None:
    """FaspGraphError if `new` puts low-rank factors beside a padded weight. PEFT's contract for a
    wrapped layer: `base_layer` holds the weight.
    """
    wraps = id(getattr(new, "base_layer", None)) == id(old)
    if wraps and any(isinstance(module, Padding) for module in old.modules()):
        raise FaspGraphError(
            f"{name} ({type(old).__name__}) is stored compact and filled with zeros when it is "
            "read (way padded), so low-rank factors beside it would bring removed units back · "
            "help: leave it out of target_modules, or train the weights themselves "
            "(modules_to_save, or no PEFT)"
        )


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _detach(module: nn.Module, adapter: nn.Module) -> None:
    """Take `adapter`, or the copy of it that a copy of its module has, off `module`."""
    for slot in SLOTS:
        held = module._modules.get(slot)
        if held is None or not _alike(held, adapter):
            continue
        del module._modules[slot]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is held]:
                del hooks[key]


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether `one` is `other` or a copy of it."""
    mine, theirs = (dict(module.named_buffers()) for module in (one, other))
    same = mine.keys() == theirs.keys() and one.axis == other.axis
    return same and all(torch.equal(mine[key], theirs[key].to(mine[key].device)) for key in mine)


register_module_module_registration_hook(_follow)
