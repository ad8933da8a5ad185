"""streams: what a norm by mean squares is to a group: a stream's, a chain's, or a reader.

read      the mean goes elsewhere: another place where the axis ends
passed    the mean comes back to the axis, and zeros there stand for what is gone: exact
mixed     what goes is not zero there; or the axis is a residual stream, to which is added what
          was read off it: models of one family expect their norms to count its width anew
"""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from .groups import Layer
from .values import Site, Value
from .visit import op_name
from .zeros import Zeros

ADDING = {"add", "sub", "rsub", "add_", "addcmul", "lerp"}


class Streams:
    """One run of propagation, seen along single axes."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.values = layer.labels.values
        self.zeros = Zeros(self.values)

    def carries(self, node: Node, unit: int) -> bool:
        """Whether a node's result has the unit on an axis."""
        value = self.values.get(node)
        leaves = value if isinstance(value, (list, tuple)) else [value]
        return any(
            bool((self.layer.component[array.numpy()] == unit).any())
            for leaf in leaves
            if isinstance(leaf, Value)
            for array in leaf.arrays.values()
        )

    def comes_back(self, site: Site, unit: int) -> bool:
        """Whether the mean meets the axis again."""
        if self.carries(site.node, unit):
            return True
        behind = {site.node}
        for node in self.values:
            if node not in behind and not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
                if self.carries(node, unit):
                    return True
        return False

    def returns(self, sites: Sequence[Site], unit: int) -> bool:
        """Whether what was read off the axis is added to what was there: a residual stream."""
        behind = {site.node for site in sites}
        for node in self.values:
            if not behind.isdisjoint(node.all_input_nodes):
                behind.add(node)
                if op_name(node) in ADDING:
                    held = {n in behind for n in node.all_input_nodes if self.carries(n, unit)}
                    if len(held) == 2:
                        return True
        return False

    def passes(self, sites: Sequence[Site], unit: int) -> bool:
        """Whether zeros reach every mean where the unit's weights are zero."""
        ends = [operand.node for site in sites for operand in site.operands[:1]]
        return all(self.zeros.stay(end, lambda n: self.carries(n, unit)) for end in ends)
