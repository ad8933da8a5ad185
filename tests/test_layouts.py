"""Packed queries, keys and values in every layout: the groups are those of heads in rows."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasp_graph as fg
from passes.capture import capture
from passes.reshapes import before
from passes.visit import op_name

HEADS, SIZE = 4, 6
TOKENS = torch.randn(3, 8, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LAYOUTS = ["".join(order) for order in itertools.permutations("qhd")]
KINDS = ("chain", "bilinear", "head")


def taken(packed, order, way):
    """q, k, v [batch, heads, tokens, size] of [batch, tokens, (order)]."""
    batch, length, _ = packed.shape
    sizes = {"q": 3, "h": HEADS, "d": SIZE}
    split = packed.reshape(batch, length, *(sizes[axis] for axis in order))
    q, h, d = (2 + order.index(axis) for axis in "qhd")
    if way in ("index", "movedim", "einsum"):
        moved = {
            "index": lambda: split.permute(q, 0, h, 1, d),
            "movedim": lambda: split.movedim((q, h, d), (0, 2, 4)),
            "einsum": lambda: torch.einsum(f"bn{order}->qbhnd", split),
        }[way]()
        return moved[0], moved[1], moved[2]
    if way == "windows":  # of places, made by the reshape that splits the channels
        split = packed.reshape(batch, 2, 4, *(sizes[axis] for axis in order))
        return split.permute(q + 1, 0, 1, h + 1, 2, d + 1)
    if way == "ranges":
        parts = [split.select(q, 0), *split.narrow(q, 1, 2).unbind(q)]
        h, d = h - (q < h), d - (q < d)
        return [part.permute(0, h, 1, d) for part in parts]
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
        return self.out(mixed.transpose(-3, -2).flatten(-2))


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


class Mixed(nn.Module):
    """Queries (d h) and keys with values in an order of their own, of one projection or of two."""

    def __init__(self, order, projections):
        super().__init__()
        self.order, self.out = order, nn.Linear(24, 5)
        widths = (72,) if projections == 1 else (24, 48)
        self.packed = nn.ModuleList(nn.Linear(24, width) for width in widths)

    def forward(self, x):
        parts = [p(x) for p in self.packed]
        q, kv = parts if len(parts) == 2 else parts[0].split([24, 48], -1)
        sizes = {"q": 2, "h": HEADS, "d": SIZE}
        kv = kv.unflatten(-1, [sizes[axis] for axis in self.order])
        at = [2 + self.order.index(axis) for axis in "qhd"]
        k, v = kv.permute(at[0], 0, at[1], 1, at[2])
        q = q.unflatten(-1, (SIZE, HEADS)).permute(0, 3, 1, 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Convolved(nn.Module):
    """Channels first [batch, (order), places], and attention over places."""

    def __init__(self, order, form):
        super().__init__()
        self.order, self.form = order, form
        self.qkv, self.out = nn.Conv2d(24, 72, 1), nn.Conv2d(24, 5, 1)

    def forward(self, x):
        sizes = {"q": 3, "h": HEADS, "d": SIZE}
        split = self.qkv(x).reshape(x.shape[0], *(sizes[axis] for axis in self.order), -1)
        q, h, d = (1 + self.order.index(axis) for axis in "qhd")
        if self.form == "chunk":  # of a merged dim, which the order must have
            merged = list(split.shape)
            merged[q : q + 2] = [merged[q] * merged[q + 1]]
            parts = self.qkv(x).reshape(merged).chunk(3, q)
        else:
            parts = split.unbind(q)
        q, k, v = (part.permute(0, h - (q < h), d - (q < d), 3) for part in parts)
        if self.form == "linear":
            state = torch.einsum("bhdn,bhen->bhde", k.softmax(-1), v)
            mixed = torch.einsum("bhde,bhdn->bhen", state, q)
        elif self.form == "einsum":
            scores = torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1)
            mixed = torch.einsum("bhij,bhdj->bhdi", scores, v)
        else:
            mixed = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        return self.out(mixed.reshape(x.shape[0], 24, *x.shape[2:]))


CASES = {
    f"{order}-{way}": (Packed, order, way)
    for order in LAYOUTS
    for way in ("unbind", "split", "index")
}
CASES |= {
    f"{order}-{way}": (Packed, order, way)
    for order, way in (
        ("qhd", "movedim"),
        ("dqh", "movedim"),
        ("hqd", "einsum"),
        ("dhq", "einsum"),
        ("dqh", "ranges"),
        ("hdq", "ranges"),
        ("hqd", "windows"),
    )
}
CASES |= {"apart": (Apart, False), "einsum": (Apart, True)}
CASES |= {"mixed": (Mixed, "hqd", 1), "two": (Mixed, "hqd", 2), "two-dqh": (Mixed, "dqh", 2)}
CASES |= {
    f"{order}-first-{form}": (Convolved, order, form)
    for order, form in zip(
        LAYOUTS, ("sdpa", "chunk", "einsum", "linear", "chunk", "einsum"), strict=True
    )
}


@pytest.mark.parametrize("name", CASES)
def test_every_layout_has_the_groups_of_heads_in_rows(name):
    torch.manual_seed(0)
    build, *given = CASES[name]
    model = build(*given).double().eval()

    inputs = TOKENS.mT.unflatten(-1, (4, 2)) if build is Convolved else TOKENS

    config = fg.Config(sparsity=0.5, kinds=KINDS, method="random", check=True)
    pruned = fg.prune(model, inputs, None, config)

    found = {g.kind: (g.size, g.blocks) for g in pruned.deps.groups if g.kind != "frozen"}
    assert found == {"bilinear": (24, 4), "chain": (24, 4), "head": (4, 1)}
    assert len(pruned.plan.kept) == 3 and pruned.report.verify_max_error < 1e-12
    fresh = torch.randn(2, *inputs.shape[1:], dtype=torch.float64)
    assert torch.allclose(pruned.model(fresh), pruned.graph_module(fresh), 0, 1e-12)


class Read(nn.Module):
    """Sizes before heads; what the first head has is read by itself as well."""

    def __init__(self):
        super().__init__()
        self.v, self.out, self.first = nn.Linear(24, 24), nn.Linear(24, 5), nn.Linear(6, 5)

    def forward(self, x):
        v = self.v(x).unflatten(-1, (SIZE, HEADS))
        mixed = v.permute(0, 3, 1, 2).softmax(2).mT @ v.permute(0, 3, 1, 2)
        mixed = mixed.permute(0, 2, 3, 1).flatten(2)
        return self.out(mixed).mean(1) + self.first(v[..., 0]).mean(1)


def test_a_head_that_is_selected_is_no_range_of_heads():
    config = fg.Config(sparsity=0.3, kinds=KINDS, method="random", check=True)

    pruned = fg.prune(Read().double().eval(), TOKENS, None, config)

    assert pruned.report.verify_max_error < 1e-12
    assert torch.allclose(pruned.model(TOKENS), pruned.graph_module(TOKENS), 0, 1e-12)


@pytest.mark.parametrize(
    ("op", "shape", "call", "found"),
    [
        ("reshape", (2, 1, 1, 6), lambda x: x.reshape(2, 1, 1, 3, 2), [0, 1, 2, None, None]),
        ("squeeze", (2, 3, 6), lambda x: x.squeeze(1), [None, None, None]),
        ("squeeze", (2, 1, 6), lambda x: x.squeeze(1), [0, 2]),
    ],
)
def test_the_dim_of_the_source_that_a_dim_was(op, shape, call, found):
    graph = capture(Calling(call), torch.randn(shape)).graph_module.graph
    (node,) = [node for node in graph.nodes if op_name(node) == op]

    assert [before(node, dim) for dim in range(len(found))] == found


class Calling(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x + 1)
