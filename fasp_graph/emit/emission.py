"""Emission: how the user's own class was made smaller, as a value that can be stored and replayed.

A group's way is one of

    native      the class's own code runs at the new size: only weights and the sizes that a leaf
                module states of itself (in_features, num_features, groups...) changed
    attributes  integer attributes of the modules around them changed too, or tuples of integers
    adapter     the class's code has the old size burned in: producers scatter their output to the
                old width, consumers gather their input from it, a norm between them works at it.
                Weights, the sizes that layers state of them, state dict and outputs are compact;
                the module's interface keeps the old width
    padded      the weights are stored compact and filled with zeros whenever they are read: for
                modules whose weights other code reads (nn.MultiheadAttention). Saves memory only
    graph       none of these works: the model is the compact graph itself
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .adapters import Axis, Gather, Padding, Scatter, attach
from .sizes import Size


@dataclass(frozen=True)
class Emission:
    """The recipe; JSON-able by `to_dict`, replayed by `apply_shapes`.

    shapes: parameter or buffer -> new shape; attributes, before: module -> name -> new, old value;
    scatter, gather: module -> axis of its output, input; padded: parameter -> its axes;
    ways: group -> way; costs: group -> elements copied: per token for an adapter, per call for
    padded weights.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, Size]] = field(default_factory=dict)
    before: dict[str, dict[str, Size]] = field(default_factory=dict)
    scatter: dict[str, Axis] = field(default_factory=dict)
    gather: dict[str, Axis] = field(default_factory=dict)
    padded: dict[str, tuple[Axis, ...]] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    costs: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "attributes": self.attributes,
            "before": self.before,
            "scatter": {k: _plain(axis) for k, axis in self.scatter.items()},
            "gather": {k: _plain(axis) for k, axis in self.gather.items()},
            "padded": {k: [_plain(axis) for axis in axes] for k, axes in self.padded.items()},
            "ways": self.ways,
            "costs": self.costs,
        }

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> Emission:
        """The inverse of `to_dict`."""
        return Emission(
            {k: tuple(v) for k, v in found["shapes"].items()},
            {k: {n: _size(v) for n, v in a.items()} for k, a in found["attributes"].items()},
            {k: {n: _size(v) for n, v in a.items()} for k, a in found["before"].items()},
            {k: _axis(v) for k, v in found["scatter"].items()},
            {k: _axis(v) for k, v in found["gather"].items()},
            {k: tuple(_axis(v) for v in axes) for k, axes in found["padded"].items()},
            dict(found["ways"]),
            {k: int(v) for k, v in found["costs"].items()},
        )


def _plain(axis: Axis) -> list[Any]:
    return [axis[0], axis[1], list(axis[2])]


def _size(found: Any) -> Size:
    return tuple(map(int, found)) if isinstance(found, (list, tuple)) else int(found)


def _axis(found: Any) -> Axis:
    axis, size, kept = found
    return int(axis), int(size), tuple(int(index) for index in kept)


def apply_shapes(
    model: nn.Module,
    emission: Emission | Mapping[str, Any],
    values: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give `model` (dense, changed in place) the shapes and adapters of `emission`.

    `values`: parameter or buffer -> tensor that becomes its content; without them, tensors of a
    new shape are zero and all others stay.
    """
    recipe = emission if isinstance(emission, Emission) else Emission.from_dict(emission)
    _set_tensors(model, recipe, values or {})
    for path, sizes in recipe.attributes.items():
        module = model.get_submodule(path)
        for name, size in sizes.items():
            kind: Any = type(getattr(module, name))
            setattr(module, name, kind(size) if isinstance(size, tuple) else size)
    for path, (axis, size, kept) in recipe.scatter.items():
        module = model.get_submodule(path)
        attach(module, Scatter(axis, size, kept, _device(module)))
    for path, (axis, _, kept) in recipe.gather.items():
        module = model.get_submodule(path)
        attach(module, Gather(axis, kept, _device(module)))
    for name, axes in recipe.padded.items():
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        padding = Padding(axes, _device(module))
        parametrize.register_parametrization(module, leaf, padding, unsafe=True)
    return model


def _set_tensors(model: nn.Module, recipe: Emission, values: Mapping[str, Tensor]) -> None:
    """New tensors where a shape or a value is given; names that were tied stay tied."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is held, so that its id stays unique
    for name in {**recipe.shapes, **values}:
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        if id(old) not in made:
            new = values.get(name)
            if new is None:
                new = torch.zeros(recipe.shapes[name], dtype=old.dtype, device=old.device)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new.detach(), old.requires_grad)
            made[id(old)] = (old, new)
        setattr(owner, leaf, made[id(old)][1])


def _device(module: nn.Module) -> torch.device:
    return next((p.device for p in module.parameters()), torch.device("cpu"))
