"""Axes of inputs and outputs that may shrink: what is handed back is cut on both sides."""

import torch
from torch import nn

from passes.analysis import analysis
from passes.capture import capture
from passes.removal import removal
from passes.rewrite import rewrite
from passes.values import OpenAxes


class Remembering(nn.Module):
    """A sum over all values so far; the values are returned."""

    def __init__(self):
        super().__init__()
        self.value, self.out = nn.Linear(5, 6), nn.Linear(6, 5)

    def forward(self, x, past):
        now = torch.cat([past, self.value(x).view(len(x), -1, 2, 3)], 1)
        return self.out(now.sum(1).flatten(1)), now


def test_open_axes_shrink_with_the_weights_that_fill_them():
    torch.manual_seed(0)
    model, inputs = Remembering().double(), (torch.randn(3, 4, 5).double(), torch.randn(3, 7, 2, 3))
    inputs = (inputs[0], inputs[1].double())
    found = capture(model, inputs)
    closed = analysis(found.graph_module, found.inputs, True)
    opened = OpenAxes({1: (2, 3)}, {1: (2, 3)})
    deps = analysis(found.graph_module, found.inputs, True, opened)

    assert all(group.kind == "frozen" for group in closed.groups)
    group = deps["value.0"]
    assert (group.kind, group.size, group.blocks) == ("chain", 6, 2)
    cut = removal(deps, {"value.0": [0, 2, 3, 4]})
    compact = rewrite(found.graph_module, cut)
    held = torch.tensor([[0, 2], [0, 1]])
    past = inputs[1].gather(3, held.expand(3, 7, 2, 2))
    result, now = compact(inputs[0], past)
    with torch.no_grad():
        model.out.weight[:, [1, 5]] = 0
    expected, dense = model(*inputs)
    torch.testing.assert_close(result, expected)
    assert torch.equal(now, dense.gather(3, held.expand(3, 11, 2, 2)))
