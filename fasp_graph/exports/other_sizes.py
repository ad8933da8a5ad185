"""Inputs of other sizes, at which an exported file is compared with the graph it was made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args
from passes.compare import outputs


def other_sizes(
    module: GraphModule, inputs: Args, shapes: Sequence[Sequence[Any]]
) -> Iterator[Args]:
    """Inputs with every dynamic axis (a name in `shapes`) doubled, or halved where the model takes
    no more.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    free = [[isinstance(size, str) for size in shape] for shape in shapes]
    names = [size for shape in shapes for size in shape if isinstance(size, str)]
    if not names or not all(name.isidentifier() for name in names):
        return
    for numerator, denominator in ((2, 1), (1, 2)):
        fresh = iter(
            [
                _resized(leaf, axes, numerator, denominator)
                for leaf, axes in zip(leaves, free, strict=True)
            ]
        )
        case = pytree.tree_map(
            lambda v, fresh=fresh: next(fresh) if isinstance(v, Tensor) else v, inputs
        )
        try:
            outputs(module, case)
        except (RuntimeError, IndexError):
            continue  # a table of positions ends here, say
        yield case
        return


def _resized(value: Tensor, axes: list[bool], numerator: int, denominator: int) -> Tensor:
    """`value` repeated or cut to the new sizes; numbers are new, 0/1 masks stay."""
    for dim, free in enumerate(axes):
        if free:
            size = max(2, value.shape[dim] * numerator // denominator)
            places = torch.arange(size, device=value.device) % value.shape[dim]
            value = value.index_select(dim, places)
    if value.is_floating_point():
        return torch.randn_like(value)
    if value.numel() and value.max() > 1:
        return value.roll(1, -1).contiguous()
    return value.contiguous()
