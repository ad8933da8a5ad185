"""Programs that model families taught the engine: each is captured, analysed and halved."""

import pytest
import torch
from torch import nn
from torch._higher_order_ops.while_loop import while_loop
from torch.nn import functional as F

import fasp_graph as fg
from benchmarks.cover_type import half
from passes.analysis import analysis
from passes.capture import capture
from passes.groups import DependencyGraph
from passes.removal import removal
from passes.rewrite import rewrite
from passes.select import least, select
from passes.verify import verify
from passes.visit import op_name

EXACT = 1e-9


def halved(model: nn.Module, inputs: object, *kinds: str) -> DependencyGraph:
    """The groups, once half of all groups of each kind has gone and the rest is verified."""
    torch.manual_seed(0)
    program = capture(model.eval(), inputs)
    deps = analysis(program.graph_module, program.inputs, check=True)
    for kind in kinds:
        kept = {g.name: half(g) for g in deps.groups if g.kind == kind and g.size > g.blocks}
        assert kept, f"no group of kind {kind}"
        cut = removal(deps, kept)
        compact = rewrite(program.graph_module, cut)
        assert verify(program.graph_module, compact, cut, program.inputs) <= EXACT
    return deps


def kind_of(deps: DependencyGraph, parameter: str, dim: int) -> set[str]:
    """The kinds of the groups that hold a dim of a parameter."""
    return {
        group.kind
        for group in deps.groups
        for member in group.members
        if (member.parameter, member.dim) == (parameter, dim) and group.layer == 0
    }


class Middle(nn.Module):
    """up -> f -> down."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x):
        return self.down(self.between(self.up(x)))

    def between(self, hidden):
        return hidden


class Capped(Middle):
    """min and max of two tensors, one of them a single learnt number (xIELU)."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(0.5))

    def between(self, hidden):
        return torch.max(torch.min(hidden, self.limit), -hidden)


def test_min_and_max_of_two_tensors_are_pointwise():
    deps = halved(Capped(), torch.randn(3, 5, 6), "chain")

    assert kind_of(deps, "up.weight", 0) == {"chain"}


class Remembered(Middle):
    """A plain tensor attribute, neither parameter nor buffer, meets the hidden axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.rand(8)

    def between(self, hidden):
        return hidden * self.table


def test_a_tensor_attribute_is_sliced_like_a_buffer():
    deps = halved(Remembered(), torch.randn(3, 5, 6), "chain")

    assert kind_of(deps, "table", 0) == {"chain"}


class Interleaved(nn.Module):
    """Even and odd places of a table are written in turn, and rotate queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(6, 16), nn.Linear(6, 16)
        self.register_buffer("frequencies", torch.rand(4))
        self.register_buffer("others", torch.rand(4))

    def forward(self, x):
        position = torch.ones(x.shape[1]).cumsum(0).unsqueeze(-1)
        table = torch.zeros(x.shape[1], 8)
        table[:, 0::2] = position * self.frequencies
        table[:, 1::2] = position * self.others
        q, k = (f(x).view(*x.shape[:2], 2, 8).transpose(1, 2) for f in (self.q, self.k))
        return (q * table.cos()) @ (k * table.sin()).transpose(-1, -2)


def test_writes_by_strides_that_cover_a_tensor_are_a_stack():
    deps = halved(Interleaved(), torch.randn(3, 5, 6), "bilinear")

    assert kind_of(deps, "frequencies", 0) == {"bilinear"}


class Turning(nn.Module):
    """Rotary positions as complex numbers: neighbours of a head are a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 16) for _ in range(3))
        self.o = nn.Linear(16, 6)
        angle = torch.outer(torch.arange(5.0), torch.rand(4)).double()
        self.register_buffer("turn", torch.polar(torch.ones_like(angle), angle))

    def heads(self, x):
        return x.view(*x.shape[:2], 2, 8)

    def turned(self, x):
        pairs = torch.view_as_complex(self.heads(x).unflatten(-1, (4, 2)))
        return torch.view_as_real(pairs * self.turn[:, None]).flatten(-2).to(x.dtype)

    def forward(self, x):
        q, k, v = self.turned(self.q(x)), self.turned(self.k(x)), self.heads(self.v(x))
        y = ((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)).mT
        return self.o(y.flatten(1, 2).mT)


def test_the_two_parts_of_a_complex_number_go_together():
    deps = halved(Turning(), torch.randn(3, 5, 6), "bilinear", "head", "chain")

    (group,) = [g for g in deps.groups if g.kind == "bilinear"]
    owned = {m.parameter: m.indices for m in group.members}
    assert owned["turn"].shape == (4, 1)
    assert (owned["q.weight"] % 8 // 2 == owned["turn"]).all()  # 2 heads, 2 parts each
    assert owned["q.weight"].shape == owned["k.weight"].shape == (4, 4)


class OneKey(Turning):
    """One head of keys and values for both heads of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8)

    def heads(self, x):
        return x.view(*x.shape[:2], x.shape[2] // 8, 8)

    def forward(self, x):
        q, k, v = self.turned(self.q(x)), self.turned(self.k(x)), self.heads(self.v(x))
        y = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).softmax(-1) @ v.transpose(1, 2)
        return self.o(y.transpose(1, 2).flatten(2))


def test_the_two_parts_of_a_complex_number_are_no_block():
    deps = halved(OneKey(), torch.randn(3, 5, 6), "bilinear", "head", "chain")

    (group,) = [g for g in deps.groups if g.kind == "bilinear"]
    assert (group.size, group.blocks) == (4, 1)
    (values,) = [g for g in deps.groups if g.kind == "chain"]
    assert (values.size, values.blocks) == (8, 1)


class Windows(nn.Module):
    """Patches by unfold; channels leave by fold."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.mix = nn.Conv2d(3, 4, 1), nn.Linear(4 * 9, 6 * 9)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        rows = nn.functional.unfold(self.conv(x).relu(), 3, padding=1)
        rows = self.mix(rows.transpose(1, 2)).transpose(1, 2)
        return self.out(nn.functional.fold(rows, x.shape[-2:], 3, padding=1))


def test_a_channel_goes_with_all_rows_of_its_windows():
    deps = halved(Windows(), torch.randn(2, 3, 5, 5), "chain")

    chains = [g for g in deps.groups if g.kind == "chain"]
    assert [(g.size, g.members[-1].indices.shape[1]) for g in chains] == [(4, 9), (6, 1)]


class Columns(nn.Module):
    """Attention along columns: channels are split into heads, then into q, k and v."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Conv1d(6, 24, 1), nn.Linear(12, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], 3, 8, x.shape[2]).split([2, 2, 4], 2)
        scores = torch.einsum("bgci,bgcj->bgij", q, k).softmax(-1)
        y = torch.einsum("bgij,bgcj->bgci", scores, v)
        return self.o(y.reshape(x.shape[0], 12, -1).mT)


def test_a_split_between_heads_and_places_stays():
    deps = halved(Columns(), torch.randn(2, 6, 6), "chain", "bilinear", "head")

    sizes = {g.kind: (g.size, g.blocks) for g in deps.groups if g.kind in ("chain", "bilinear")}
    assert sizes == {"chain": (12, 3), "bilinear": (6, 3)}


class Stepping(nn.Module):
    """Cells in a loop, one feeding the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTMCell(6, 10), nn.GRUCell(10, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        h, c, g = (torch.zeros(x.shape[0], n) for n in (10, 10, 8))
        for step in range(x.shape[1]):
            h, c = self.first(x[:, step], (h, c))
            g = self.second(h, g)
        return self.out(g)


def test_a_cell_takes_and_gives_the_same_places_of_its_state():
    deps = halved(Stepping(), torch.randn(4, 3, 6), "bilinear")

    found = {g.size: g for g in deps.groups if g.kind == "bilinear"}
    assert set(found) == {10, 8}
    rows = {m.parameter: m.indices.shape[1] for m in found[10].members}
    assert rows["first.weight_ih"] == 4 and rows["second.weight_ih"] == 1


class EveryOther(Middle):
    """Only the even places of the hidden axis are overwritten."""

    def between(self, hidden):
        written = hidden * 1.0
        written[..., 0::2] = torch.relu(hidden[..., 1::2])
        return written


def test_writes_by_strides_that_leave_places_freeze_the_axis():
    deps = halved(EveryOther(), torch.randn(3, 5, 6))

    assert kind_of(deps, "up.weight", 0) == {"frozen"}
    assert "written by strides" in deps.explain("up.weight")


class Parts(Middle):
    """The hidden axis is taken apart, each part gets another shift, and put together again."""

    def between(self, hidden):
        few, more = hidden.split([2, 6], -1)
        return torch.cat([few + 1, torch.relu(more)], -1).relu()


def test_each_piece_of_a_split_axis_keeps_a_unit():
    deps = halved(Parts(), torch.randn(3, 5, 6))
    (chain,) = [g for g in deps.groups if g.kind == "chain"]

    utility = torch.tensor([0.2, 0.1, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert [p.tolist() for p in chain.pieces] == [[0, 1], [2, 3, 4, 5, 6, 7]]
    assert select(chain, utility, 3) == (0, 6, 7)
    assert select(chain, utility, 2) == (0, 7)
    assert least(chain, 1) == 2


@pytest.mark.parametrize("method", ["magnitude", "fasp", "best"])
def test_pruning_deep_leaves_no_piece_empty(method):
    torch.manual_seed(0)
    model = Parts().eval()
    model.up.weight.data[:2] *= 1e-4
    model.up.bias.data[:2] = 0

    config = fg.Config(sparsity=0.6, method=method)
    pruned = fg.prune(model, torch.randn(3, 5, 6), [torch.randn(9, 5, 6)], config)

    kept = pruned.plan.kept["up.0"]
    assert {0, 1} & set(kept) and set(kept) - {0, 1}
    assert pruned.report.verify_max_error <= EXACT


class Sloped(nn.Module):
    """Two attention layers add the same constant slope per head to their scores."""

    def __init__(self) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(6, 36) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(12, 6) for _ in range(2))

    def forward(self, x):
        far = torch.arange(x.shape[1]) * torch.tensor([1, 2, 3]).reshape(3, 1, 1) / 8
        for projection, out in zip(self.projections, self.outs, strict=True):
            q, k, v = projection(x).view(*x.shape[:2], 3, 3, 4).permute(2, 0, 3, 1, 4)
            weights = (q @ k.transpose(-1, -2) - far).softmax(-1)
            x = x + out((weights @ v).transpose(1, 2).flatten(2))
        return x


def test_a_constant_that_two_layers_share_does_not_tie_their_heads():
    deps = halved(Sloped(), torch.randn(2, 5, 6), "head")

    assert len([g for g in deps.groups if g.kind == "head"]) == 2


def test_aliases_of_constants_that_lose_nothing_are_gone_after_the_rewrite():
    program = capture(Sloped().eval(), torch.randn(2, 5, 6))
    deps = analysis(program.graph_module, program.inputs)
    heads = next(g for g in deps.groups if g.kind == "head")

    compact = rewrite(program.graph_module, removal(deps, {heads.name: half(heads)}))

    names = [op_name(node) for node in compact.graph.nodes]
    assert names.count("alias") == 0 and names.count("index_select") == 1


class Looping(Middle):
    """A loop that numbers end, as an op of its own; behind it another MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.rise, self.fall = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        return self.fall(torch.relu(self.rise(super().forward(x))))

    def between(self, hidden):
        return while_loop(lambda h: h.sum() < 9, lambda h: (h.abs() * 2,), (hidden,))[0]


class Drawing(Looping):
    """A branch that draws numbers, as an op of its own."""

    def between(self, hidden):
        noisy = lambda h: F.dropout(h, 0.5, True)  # noqa: E731
        return torch.cond(hidden.sum() > 1e9, noisy, torch.tanh, (hidden,))


@pytest.mark.parametrize(("program", "op"), [(Looping, "while_loop"), (Drawing, "cond: it draws")])
def test_control_flow_that_stays_freezes_what_it_touches_and_no_more(program, op):
    deps = halved(program(), torch.randn(3, 5, 6), "chain")

    assert kind_of(deps, "up.weight", 0) == {"frozen"}
    assert f"no axis rule for {op}" in deps.explain("up.weight")
    assert kind_of(deps, "rise.weight", 0) == {"chain"}


class Window(Middle):
    """Places 2 to 4 of the hidden axis are overwritten, at tokens 1 and 2 only."""

    def between(self, hidden):
        written = hidden * 1.0
        written[:, 1:3, 2:5] = torch.relu(hidden[:, 2:4, 2:5])
        return written


def test_writes_through_slices_of_slices_become_scatters():
    deps = halved(Window(), torch.randn(3, 5, 6), "chain")

    assert kind_of(deps, "up.weight", 0) == {"chain"}


class Overseen(Middle):
    """A view that was taken before the write is read after it."""

    def between(self, hidden):
        written = hidden * 1.0
        rows = written[:, 1:3]
        rows[:, :, 2:5] = torch.relu(hidden[:, 2:4, 2:5])
        return written + rows.sum(1, keepdim=True)


def test_writes_that_a_view_sees_stay_and_freeze():
    deps = halved(Overseen(), torch.randn(3, 5, 6))

    assert kind_of(deps, "up.weight", 0) == {"frozen"}
    assert "writes through a view" in deps.explain("up.weight")


class Normed(nn.Module):
    """Two group norms of other numbers of groups on one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 24, 1)
        self.c = nn.Conv2d(24, 5, 1)
        self.four, self.eight, self.three = (nn.GroupNorm(g, c) for g, c in GROUPS)

    def forward(self, x):
        h = self.a(x)
        return self.c(self.three(self.b(torch.relu(self.four(h)) + self.eight(h))))


GROUPS = ((4, 16), (8, 16), (3, 24))


def test_every_group_of_a_norm_keeps_as_many_channels():
    deps = halved(Normed(), torch.randn(2, 3, 4, 4), "width")

    blocks = {g.members[0].parameter: g.blocks for g in deps.groups if g.kind == "width"}
    assert blocks == {"a.weight": 8, "b.weight": 3}


def test_channels_with_a_group_each_do_not_mix():
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.GroupNorm(16, 16), nn.Conv2d(16, 3, 1))

    deps = halved(model, torch.randn(2, 3, 4, 4), "chain")

    assert kind_of(deps, "1.weight", 0) == {"chain"}


class Uneven(Middle):
    """Two parts of six channels, and three of four: no number of them leaves both even."""

    def between(self, hidden):
        two, three = hidden.unflatten(-1, (2, 6)), hidden.unflatten(-1, (3, 4))
        return torch.relu(two).flatten(-2) + torch.tanh(three).flatten(-2)


def test_blocks_of_unequal_size_stay():
    deps = halved(Uneven(12), torch.randn(3, 5, 6))

    assert kind_of(deps, "up.weight", 0) == {"frozen"}
    assert "blocks of unequal size [2, 4]" in deps.explain("up.weight")


class Flat(nn.Module):
    """Attention of one head on [tokens, channels]."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        q = self.q(x)
        return self.o(nn.functional.scaled_dot_product_attention(q, q, self.v(x)))


def test_attention_on_two_dims():
    halved(Flat(), torch.randn(5, 6), "bilinear", "chain")


class Categories(nn.Module):
    """Columns of numbers that each mean something else."""

    def __init__(self) -> None:
        super().__init__()
        self.many, self.few = nn.Embedding(50, 4), nn.Embedding(3, 4)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 2)

    def forward(self, c):
        return self.down(self.up(torch.cat([self.many(c[:, 0]), self.few(c[:, 1])], -1)).relu())


def test_the_proof_takes_rows_as_they_are_where_columns_cannot_be_mixed():
    halved(Categories(), torch.tensor([[40, 1], [3, 2], [7, 0]]), "chain")
