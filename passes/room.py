"""room: where a walk runs: in one process or in several, with how much memory.

Each of several processes walks over its share of the batches, and sums of all are taken where they
decide something, so that all decide alike. A sum is taken by all or by none: whatever batches a
process has, also none, it must come to the same sums in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import NoGradient


def _alone(value: Tensor) -> Tensor:
    return value


def _ahead(counts: Tensor) -> Tensor:
    return counts.cumsum(0) - counts


@dataclass(frozen=True)
class Room:
    """`total` adds a tensor up over all processes, perhaps in place. `ahead` takes counts [own
    batches, ...] and gives the sum over all batches before each, those of other processes too.
    `settle` may move the live values of all batches out of memory.
    """

    total: Callable[[Tensor], Tensor] = _alone
    ahead: Callable[[Tensor], Tensor] = _ahead
    settle: Callable[[list[dict[Node, Any]]], None] | None = None

    def sums(self, *values: float) -> list[float]:
        """Each number, added up over all processes."""
        return self.total(torch.tensor(values, dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """NoGradient in all processes if it is raised in one of them."""
        found = None
        try:
            yield
        except NoGradient as error:
            found = error
        (failed,) = self.sums(found is not None)
        if failed:
            raise found or NoGradient("another process found no derivative · help: see its error")
