"""room: where a walk runs: in one process or in several, on which devices, in how much memory.

Each of several processes walks over its share of the batches, and sums of all are taken where they
decide something, so that all decide alike. A sum is taken by all or by none: whatever batches a
process has, also none, it must come to the same sums in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import NoGradient

Settle = Callable[[list[dict[Node, Any]], dict[Node, Any]], None]


def _alone(value: Tensor) -> Tensor:
    return value


@dataclass(frozen=True)
class Room:
    """`total` adds a tensor up over all processes, perhaps in place. `settle` may move the live
    values of all batches out of memory, when those of one have changed. Of `size` processes number
    `rank` has the batches rank, rank + size, ... `devices`: those to compute on, if not where the
    model is (passes/placement.py).
    """

    total: Callable[[Tensor], Tensor] = _alone
    settle: Settle | None = None
    rank: int = 0
    size: int = 1
    devices: tuple[torch.device, ...] = ()

    @property
    def unbounded(self) -> Room:
        """The same with no bound on memory."""
        return replace(self, settle=None)

    def sums(self, *values: float) -> list[float]:
        """Each number, added up over all processes."""
        return self.total(torch.tensor(values, dtype=torch.float64)).tolist()  # type: ignore[no-any-return]

    def ahead(self, counts: Tensor) -> Tensor:
        """Of counts [own batches, ...] the sums over all batches, of any process, before each."""
        (batches,) = self.sums(len(counts))
        every = counts.new_zeros(int(batches), *counts.shape[1:])
        every[self.rank :: self.size] = counts
        every = self.total(every)
        return (every.cumsum(0) - every)[self.rank :: self.size]

    def in_turn(self, generator: torch.Generator) -> Iterator[bool]:
        """For each process whether it is this one: it draws where the one before it ended."""
        for turn in range(self.size):
            yield turn == self.rank
            state = generator.get_state()
            generator.set_state(self.total(state * (turn == self.rank)))

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
