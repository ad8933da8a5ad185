"""analysis: a captured program -> its dependency graph. Labels once, and once more on blocks."""

from __future__ import annotations

from torch.fx import GraphModule

from .blocks import has_blocks
from .capture import Args
from .couple import couple
from .groups import DependencyGraph
from .labels import propagate
from .values import CLOSED, OpenAxes


def analysis(
    module: GraphModule, inputs: Args, check: bool = False, open_axes: OpenAxes = CLOSED
) -> DependencyGraph:
    """The groups of a captured program at example inputs; weights are not read."""
    labels = propagate(module, inputs, check, False, open_axes)
    blocks = propagate(module, inputs, check, True, open_axes) if has_blocks(labels) else None
    return couple(labels, dict(module.named_parameters(remove_duplicate=False)), blocks)
