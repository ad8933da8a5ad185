"""unchanged: whether other weights make the same function, tried on the model before anything
relies on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from .capture import Args
from .compare import outputs
from .lazy import Lazy, materialized, replace
from .precision import widened, widened_inputs
from .verify import difference

SAME = 1e-4  # relative; sums in another order
Moves = Mapping[str, Callable[[Tensor], Tensor]]
"""parameter -> what makes its new weight of the old one, of the same shape and dtype"""


@torch.no_grad()
def unchanged(module: GraphModule, moves: Moves, inputs: Args) -> bool:
    """Whether the outputs at the example inputs stay the same under `moves`, of wide weights: the
    new ones, rounded to half precision, would differ by more than SAME.
    """
    plain, other, given = widened(module), widened(module), widened_inputs(inputs)
    replace(other, lambda name, held: moved(held.detach(), moves[name]) if name in moves else None)
    pair = (outputs(graph, given) for graph in (plain, other))
    return all(difference(a, b) <= SAME for a, b in zip(*pair, strict=True))


def moved(weight: Tensor, move: Callable[[Tensor], Tensor]) -> Lazy:
    """The new weight, as a promise."""
    return Lazy(
        weight.shape, weight.dtype, lambda: move(materialized(weight)), device=weight.device
    )
