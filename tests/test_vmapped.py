"""Models that call torch.vmap: their graphs hold plain ops, and prune like any other."""

import pytest
import torch
from torch import nn

import fasp_graph as fg
from passes.capture import capture


class Mapped(nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(7, 16), nn.Linear(16, 5)
        self.gains = nn.Parameter(torch.rand(3) + 0.5)
        self.mapped = torch.vmap(function, **options)

    def forward(self, x):
        return self.b(self.mapped(torch.relu(self.a(x)), self.gains))


def scaled(row, gains):
    return row * gains.sum() / (1 + row.square().sum())


def nested(rows, gains):
    return torch.vmap(lambda row: row * gains[0] + row.new_ones(())[None] * 0.5)(rows)


MODELS = {
    "one": (lambda: Mapped(scaled, in_dims=(0, None)), (4, 7)),
    "two": (lambda: Mapped(nested, in_dims=(0, None)), (4, 3, 7)),
}


@pytest.mark.parametrize("name", MODELS)
def test_vmap_is_plain_ops_in_the_graph(name):
    build, shape = MODELS[name]
    model, x = build().eval(), torch.randn(shape)

    program = capture(model, x)
    pruned = fg.prune(
        model, x, None, fg.Config(0.4, "magnitude", kinds=("chain", "bilinear"), check=True)
    )

    assert not [n for n in program.graph_module.graph.nodes if "batch_dim" in str(n.target)]
    assert pruned.model.a.weight.shape[0] < 16
    wide = torch.cat([x, x + 1])
    with torch.no_grad():
        torch.testing.assert_close(program.graph_module(wide), model(wide))
        torch.testing.assert_close(pruned.graph_module(wide), pruned.model(wide))
