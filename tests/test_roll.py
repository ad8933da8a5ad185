"""A roll along channels is movement: the compact graph takes what stays in the dense order."""

import pytest
import torch
from torch import nn

import fasp_graph as fg

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Rolled(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.way, self.up, self.down = way, nn.Linear(6, 20), nn.Linear(20, 3)

    def forward(self, x):
        return self.down(self.way(self.up(x)))


WAYS = {
    "alone": (lambda h: h.relu().roll(3, -1), 20, 1),
    "back": (lambda h: h.roll(-27, 1).sigmoid() - 0.5, 20, 1),
    "halves meet": (lambda h: h + h.roll(10, -1), 10, 1),
    "fours meet": (lambda h: h * h.roll(5, -1), 5, 1),
    "inside blocks": (lambda h: h.view(-1, 4, 5).roll(2, -1).flatten(1), 20, 4),
    "blocks": (lambda h: h.view(-1, 4, 5).roll(1, 1).flatten(1), 20, 4),
}


@pytest.mark.parametrize("name", WAYS)
def test_rolled_channels_are_pruned(name):
    torch.manual_seed(0)
    way, size, blocks = WAYS[name]

    config = fg.Config(sparsity=0.5, method="random", check=True)
    pruned = fg.prune(Rolled(way).double().eval(), X, None, config)

    (chain,) = [group for group in pruned.deps.groups if group.kind == "chain"]
    assert (chain.size, chain.blocks) == (size, blocks)
    assert pruned.report.verify_max_error < 1e-12
    assert torch.allclose(pruned.model(X), pruned.graph_module(X), 0, 1e-12)


@pytest.mark.parametrize(
    "way", [lambda h: h + h.roll(1, -1), lambda h: h.roll(7), lambda h: h.roll((1, 2), (0, 1))]
)
def test_other_rolls_keep_their_channels(way):
    deps = fg.analyze(Rolled(way).double().eval(), X, check=True)

    assert {group.kind for group in deps.groups} == {"frozen"}
