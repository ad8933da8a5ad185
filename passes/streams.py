"""streams: what a mean over a group's axis is to the group.

read      the mean goes elsewhere: another place where the axis ends
passed    the mean comes back to the axis, and zeros there stand for what is gone: exact
mixed     what goes is not zero there; or the axis is a residual stream, to which is added what
          was read off it: models of one family expect their norms to count its width anew
"""

from __future__ import annotations

import functools
from bisect import bisect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.fx import Node

from .groups import Layer
from .values import Site, Value
from .visit import op_name
from .zeros import Zeros

ADDING = {"add", "sub", "rsub", "add_", "addcmul", "lerp"}


def _arrays(value: Any) -> Iterator[Tensor]:
    for leaf in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(leaf, Value):
            yield from leaf.arrays.values()


class Streams:
    """One run of propagation, seen along single axes."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.values = layer.labels.values
        self.zeros = Zeros(self.values)
        self._nodes = list(self.values)
        self.place = {node: number for number, node in enumerate(self._nodes)}
        self.adds = [node for node in self.values if op_name(node) in ADDING]

    def carries(self, node: Node, unit: int) -> bool:
        """Whether a node's result has the unit on an axis."""
        units = (self.layer.component[array.numpy()] for array in _arrays(self.values.get(node)))
        return any(bool((held == unit).any()) for held in units)

    @functools.cached_property
    def _last(self) -> np.ndarray:
        """For each unit the place of the last node that carries it."""
        found = np.full(int(self.layer.component.max()) + 1, -1)
        for place, value in enumerate(self.values.values()):
            for array in _arrays(value):
                found[self.layer.component[array.numpy()]] = place
        return found

    def last(self, unit: int) -> Node:
        """The last node that carries a unit of a weight."""
        return self._nodes[self._last[unit]]

    def comes_back(self, site: Site, unit: int) -> bool:
        """Whether the mean meets the axis again."""
        seen, waiting = {site.node}, [site.node]
        while waiting:
            node = waiting.pop()
            if self.carries(node, unit):
                return True
            waiting += [user for user in node.users if user not in seen]
            seen.update(node.users)
        return False

    def returns(self, sites: Sequence[Site], unit: int) -> bool:
        """Whether what was read off the axis is added to what was there, and read again."""
        ends = {site.node for site in sites}
        first, last = (pick((self.place[end] for end in ends), default=0) for pick in (min, max))
        low, high = (bisect(self.adds, at, key=self.place.__getitem__) for at in (first, last))
        for node in self.adds[low:high]:
            sides = [side for side in node.all_input_nodes if self.carries(side, unit)]
            if len({self._behind(side, ends, first) for side in sides}) == 2:
                return True
        return False

    def _behind(self, node: Node, ends: set[Node], first: int) -> bool:
        """Whether a node depends on one of `ends`, of which none stands before place `first`."""
        seen, waiting = {node}, [node]
        while waiting:
            node = waiting.pop()
            if node in ends:
                return True
            fresh = [arg for arg in node.all_input_nodes if arg not in seen]
            waiting += [arg for arg in fresh if self.place[arg] >= first]
            seen.update(fresh)
        return False

    def passes(self, sites: Sequence[Site], unit: int) -> bool:
        """Whether zeros reach every mean where the unit's weights are zero."""
        ends = [operand.node for site in sites for operand in site.operands[:1]]
        return all(self.zeros.stay(end, lambda n: self.carries(n, unit)) for end in ends)
