"""Heads under a group norm go with the groups of the norm."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasp_graph as fg

TOKENS = torch.randn(3, 7, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Normed(nn.Module):
    """Attention of 4 heads of 6, normalised in groups of channels: by tokens, or over them."""

    def __init__(self, groups, functional):
        super().__init__()
        self.groups, self.functional = groups, functional
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)
        self.norm = nn.GroupNorm(groups, 24)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.functional:
            weight, bias = self.norm.weight, self.norm.bias
            return self.out(F.group_norm(mixed.mT, self.groups, weight, bias).mT)
        return self.out(self.norm(mixed.flatten(0, 1)).view(mixed.shape))


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize(("groups", "heads"), [(4, 4), (2, 2), (8, 4)])
@pytest.mark.parametrize(
    ("kinds", "sparsity"), [(("head",), 0.4), (("head", "bilinear", "width"), 0.6)]
)
def test_heads_go_with_their_groups(groups, heads, functional, kinds, sparsity):
    torch.manual_seed(0)
    model = Normed(groups, functional).double().eval()

    config = fg.Config(sparsity=sparsity, kinds=kinds, method="random", check=True)
    pruned = fg.prune(model, TOKENS, None, config)

    (whole,) = [group for group in pruned.deps.groups if group.kind == "head"]
    assert whole.size == heads and len(pruned.plan.kept[whole.name]) < heads
    assert pruned.report.verify_max_error < 1e-12
    (norm,) = [n for n in pruned.graph_module.graph.nodes if "group_norm" in str(n.target)]
    assert norm.args[1] == groups * len(pruned.plan.kept[whole.name]) // heads
    fresh = torch.randn(2, 7, 12, dtype=torch.float64)
    assert torch.allclose(pruned.model(fresh), pruned.graph_module(fresh), 0, 1e-12)
