"""Packed queries, keys and values in every layout: the groups are those of heads in rows."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasp_graph as fg

HEADS, SIZE = 4, 6
TOKENS = torch.randn(3, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYOUTS = ["".join(order) for order in itertools.permutations("qhd")]
KINDS = ("chain", "bilinear", "head")


def taken(packed, order, way):
    """q, k, v [batch, heads, tokens, size] of [batch, tokens, (order)]."""
    batch, length, _ = packed.shape
    sizes = {"q": 3, "h": HEADS, "d": SIZE}
    split = packed.reshape(batch, length, *(sizes[axis] for axis in order))
    q, h, d = (2 + order.index(axis) for axis in "qhd")
    if way == "index":
        moved = split.permute(q, 0, h, 1, d)
        return moved[0], moved[1], moved[2]
    parts = split.unbind(q) if way == "unbind" else [p.squeeze(q) for p in split.split(1, q)]
    h, d = h - (q < h), d - (q < d)
    return [part.permute(0, h, 1, d) for part in parts]


class Packed(nn.Module):
    def __init__(self, order, way):
        super().__init__()
        self.order, self.way = order, way
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 5)

    def forward(self, x):
        q, k, v = taken(self.qkv(x), self.order, self.way)
        mixed = ((q * 0.3) @ k.mT).softmax(-1) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class Apart(nn.Module):
    """Projections of their own, sizes before heads at both ends; for einsum as they are."""

    def __init__(self, einsum):
        super().__init__()
        self.einsum, self.out = einsum, nn.Linear(24, 5)
        self.q, self.k, self.v = (nn.Linear(24, 24) for _ in range(3))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (SIZE, HEADS)) for p in (self.q, self.k, self.v))
        if self.einsum:
            scores = torch.einsum("btdh,bsdh->bhts", q, k).softmax(-1)
            return self.out(torch.einsum("bhts,bsdh->btdh", scores, v).flatten(2))
        q, k, v = (part.transpose(1, 3).transpose(2, 3) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.permute(0, 2, 3, 1).flatten(2))


CASES = {
    f"{order}-{way}": (Packed, order, way)
    for order in LAYOUTS
    for way in ("unbind", "split", "index")
}
CASES |= {"apart": (Apart, False), "einsum": (Apart, True)}


@pytest.mark.parametrize("name", CASES)
def test_every_layout_has_the_groups_of_heads_in_rows(name):
    torch.manual_seed(0)
    build, *given = CASES[name]
    model = build(*given).double().eval()

    config = fg.Config(sparsity=0.5, kinds=KINDS, method="random", check=True)
    pruned = fg.prune(model, TOKENS, None, config)

    found = {g.kind: (g.size, g.blocks) for g in pruned.deps.groups if g.kind != "frozen"}
    places = (6, 1) if build is Apart else (24, 4)  # merged sizes first: one place of all heads
    assert found == {"bilinear": (24, 4), "chain": places, "head": (4, 1)}
    assert len(pruned.plan.kept) == 3 and pruned.report.verify_max_error < 1e-12
    fresh = torch.randn(2, 7, 24, dtype=torch.float64)
    assert torch.allclose(pruned.model(fresh), pruned.graph_module(fresh), 0, 1e-12)
