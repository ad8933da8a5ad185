"""fresh: inputs of an example's form that two models are compared on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .free_axes import Args

WAYS = ("drawn", "shuffled", "rows", "same")


def doubled(inputs: Args) -> Args:
    """Every tensor twice as long along its first dim, if it has more than one place there."""
    return pytree.tree_map(
        lambda v: torch.cat([v, v]) if isinstance(v, Tensor) and v.dim() and len(v) > 1 else v,
        inputs,
    )


def fresh_inputs(
    inputs: Args,
    seed: int,
    precise: bool,
    way: str = "drawn",
    held: frozenset[int] = frozenset(),
) -> Args:
    """Inputs of the same form: floating point drawn anew, integers permuted (`shuffled`: both
    permuted; `rows`: along the first dim, all alike; `same`: as they are). Those at the places
    `held` stay.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: dict[int, Tensor] = {}

    def order(count: int, device: torch.device) -> Tensor:
        return torch.randperm(count, generator=generator).to(device)

    def renew(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.is_floating_point() and way == "drawn":
            noise = torch.randn(value.shape, generator=generator).to(value.device, value.dtype)
            return noise.double() if precise else noise
        value = in_float64(value) if precise else value
        if way == "same" or not value.dim():
            return value
        if way == "rows":
            if len(value) not in rows:
                rows[len(value)] = order(len(value), value.device)
            return value[rows[len(value)]]
        return value.reshape(-1)[order(value.numel(), value.device)].reshape(value.shape)

    leaves, spec = pytree.tree_flatten(inputs)
    renewed = [leaf if k in held else renew(leaf) for k, leaf in enumerate(leaves)]
    return pytree.tree_unflatten(renewed, spec)


def in_float64(held: Tensor) -> Tensor:
    """Floating point as float64, complex numbers as complex128, others as they are."""
    if held.is_complex():
        return held.to(torch.complex128)
    return held.double() if held.is_floating_point() else held
