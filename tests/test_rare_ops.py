"""Ops that few models use: each finds its chain and prunes it exactly, or says why it is frozen.

Exact is: verified by the run itself (compact graph against masked dense graph, float64), and equal
to the user's own module with zeros where its weights read a removed unit.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trial import zeroed

import fasp_graph as fg
from passes.compare import tensors

X = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
TURNED = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])


class Calls(nn.Module):
    """Layers by name, and a forward that is a function of them and x."""

    def __init__(self, forward, **layers):
        super().__init__()
        torch.manual_seed(0)
        made = {"a": (7, 8), "b": (8, 5)} | layers
        for name, made_of in made.items():
            setattr(self, name, nn.Linear(*made_of) if isinstance(made_of, tuple) else made_of())
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def rows(x):
    """A row's number for each row, read from the data."""
    return (x[:, 0].abs() * 10).long() % 6


def written_by_index(m, x):
    h = torch.relu(m.a(x))
    return m.b(h.index_put((rows(x),), torch.tanh(h)))


def written_by_mask(m, x):
    h = torch.relu(m.a(x))
    return m.b(h.index_put((h > 0.5,), torch.tensor(0.5)))


def of_rows(m, x):
    h = torch.relu(m.a(x))
    return m.b(h[x[:, 0] > 0]).sum(0)


def of_rows_and_steps(m, x):
    h = torch.relu(m.a(x.view(2, 3, 7)))
    return m.b(h[x.view(2, 3, 7)[..., 0] > 0]).sum(0)


def of_steps(m, x):
    h = torch.relu(m.a(x.view(2, 3, 7)))
    return m.b(h[:, x[:3, 0] > 0]).sum((0, 1))


def written_to_rows(m, x):
    h, mask = torch.relu(m.a(x)), x[:, 0] > 0
    h[mask] = torch.tanh(h[mask])
    return m.b(h)


def added_to_rows(m, x):
    h, mask = torch.relu(m.a(x.view(2, 3, 7))), x.view(2, 3, 7)[..., 1] > 0
    h[mask] += torch.tanh(h[mask])
    return m.b(h)


def a_token_in_rows(m, x):
    h = torch.relu(m.a(x.view(2, 3, 7)))
    h[x.view(2, 3, 7)[..., 1] > 0] = m.token
    return m.b(h)


def repeated_by_data(m, x):
    h = torch.relu(m.a(x)).repeat_interleave((x[:, 0] > 0).long() + 1, 0)
    return m.b(h).sum(0)


def repeated_by_a_table(m, x):
    return m.b(torch.relu(m.a(x)).repeat_interleave(torch.tensor([2] * 8), 1))


def one_hot(m, x):
    return m.b(F.one_hot(m.a(x).argmax(-1), 8).to(x.dtype))


def compared(m, x):
    chosen = m.a(x).argmax(-1, keepdim=True)
    return m.b((chosen == torch.arange(8)).to(x.dtype))


def a_number(m, x):
    h = m.a(x)
    return m.b(h * h.argmax(-1, keepdim=True))


def at_places(m, x):
    h = torch.relu(m.a(x))
    i, _ = torch.where(x > 0)
    return m.b(h).index_add(0, i, m.b(h)[i])


def as_large_together(m, x):
    h, scale, shift = torch.broadcast_tensors(torch.relu(m.a(x)), x[:, :1], m.shift)
    return m.b(h * scale + shift)


CHAINS = {
    "written by a mask": (Calls(written_by_mask), 8),
    "rows of a mask": (Calls(of_rows), 8),
    "rows and steps of a mask": (Calls(of_rows_and_steps), 8),
    "steps of a mask": (Calls(of_steps), 8),
    "written to rows of a mask": (Calls(written_to_rows), 8),
    "added to rows of a mask": (Calls(added_to_rows), 8),
    "a token in rows of a mask": (
        Calls(a_token_in_rows, token=lambda: nn.Parameter(torch.ones(8))),
        8,
    ),
    "as large as others": (Calls(as_large_together, shift=lambda: nn.Parameter(torch.ones(8))), 8),
    "a random slope, outside of training": (Calls(lambda m, x: m.b(F.rrelu(m.a(x)))), 8),
    "repeated by data": (Calls(repeated_by_data), 8),
    "repeated by a table": (Calls(repeated_by_a_table, b=(16, 5)), 8),
    "glu": (Calls(lambda m, x: m.b(F.glu(m.a(x))), a=(7, 16)), 8),
    "turned by a table": (Calls(lambda m, x: m.b(torch.relu(m.a(x))[:, TURNED])), 8),
    "index_select": (Calls(lambda m, x: m.b(torch.relu(m.a(x)).index_select(1, TURNED))), 8),
    "index_select from the end": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x)).index_select(-1, TURNED))),
        8,
    ),
    "windows in memory": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x))).as_strided((2, 2, 5), (5, 5, 1)).sum(1)),
        8,
    ),
    "written by an index": (Calls(written_by_index), 8),
    "turned as a plane": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x.view(2, 3, 7))).rot90(1, (1, 2)).mT)),
        8,
    ),
    "rows repeated": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x)).repeat_interleave(2, 0).roll(1, 0).flip([0]))),
        8,
    ),
    "joined with no place": (
        Calls(lambda m, x: m.b(torch.cat([m.a(x)[:, :0], torch.relu(m.a(x))], 1))),
        8,
    ),
    "numbers in the code": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x) + torch.tensor([0.1, 0.2, 0.3, 0.4] * 2)))),
        8,
    ),
    "places where a mask holds": (Calls(at_places), 8),
    "repeat": (Calls(lambda m, x: m.b(torch.relu(m.a(x)).repeat(1, 2)), b=(16, 5)), 8),
    "pixel_shuffle": (
        Calls(lambda m, x: m.b(F.pixel_shuffle(m.a(x).view(6, 8, 1, 1), 2).flatten(1)), b=(8, 5)),
        2,
    ),
    "channel_shuffle": (
        Calls(
            lambda m, x: m.b(F.channel_shuffle(torch.relu(m.a(x)).view(-1, 8, 1, 1), 4).flatten(1))
        ),
        2,
    ),
    "the type of another": (
        Calls(lambda m, x: m.b(torch.relu(m.a(x)).double().type_as(m.b.bias))),
        8,
    ),
    "two LSTMs": (Calls(lambda m, x: m.b(m.r(x[None])[0]), r=lambda: nn.LSTM(7, 8, 2)), 8),
    "GRU both ways": (
        Calls(lambda m, x: m.b(m.r(x[None])[0]), r=lambda: nn.GRU(7, 4, 2, bidirectional=True)),
        4,
    ),
}
FROZEN = {
    "seen as other bits": (
        Calls(lambda m, x: m.b(m.a(x)) * (m.a(x).view(torch.int32).sum(-1, True) < 0)),
        "view.dtype",
    ),
    "seen as half its bits": (
        Calls(lambda m, x: m.b(m.a(x).view(torch.int16).view(torch.float32))),
        "view.dtype",
    ),
    "padded by ones": (
        Calls(lambda m, x: m.b(F.pad(torch.relu(m.a(x)), (1, 1), value=1.0)), b=(10, 5)),
        "padded by",
    ),
    "strides in memory": (
        Calls(lambda m, x: m.b(m.a(x)[:, :4].as_strided((6, 4), (8, 2))), b=(4, 5)),
        "as_strided",
    ),
    "more of memory than is seen": (
        Calls(lambda m, x: m.b(m.a(x)[:2].as_strided((6, 8), (8, 1)))),
        "as_strided",
    ),
    "chances": (
        Calls(lambda m, x: m.b(m.a(x) * torch.bernoulli(m.a(x).sigmoid()))),
        "draws numbers",
    ),
    "noise in another order of memory": (
        Calls(lambda m, x: m.b(m.a(x) + torch.randn_like(m.a(x).t()).t())),
        "draws numbers",
    ),
    "argmax over all": (Calls(lambda m, x: m.b(m.a(x)) * m.a(x).argmax()), "over all"),
    "an index as a number": (Calls(a_number), "used as a number"),
    "an index compared": (Calls(compared), "used as a number"),
    "LSTM with projections": (
        Calls(lambda m, x: m.b(m.r(m.a(x)[None])[0]), r=lambda: nn.LSTM(8, 9, proj_size=8)),
        "with projections",
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_chain_is_found_and_pruned_exactly(name):
    model, size = CHAINS[name]
    model.eval()

    options = {"sparsity": 0.4, "method": "magnitude", "kinds": ("chain", "bilinear")}

    result = fg.prune(model, X, None, fg.Config(check=True, **options))

    kept = result.plan.kept
    assert [result.deps[group].size for group in kept] == [size], result.deps.listing()
    expected = zeroed(model, result.deps, {group: list(units) for group, units in kept.items()})
    (found,), (wanted,) = tensors(result.graph_module(X)), tensors(expected(X))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def unequally_repeated(m, x):
    times = torch.tensor([1, 2, 1, 2, 3, 3, 0, 1])
    return m.b(torch.relu(m.a(x)).repeat_interleave(times, -1))


def test_channels_that_a_table_repeats_go_with_their_copies():
    config = fg.Config(sparsity=0.4, method="magnitude", check=True)

    result = fg.prune(Calls(unequally_repeated, b=(13, 5)).eval(), X, None, config)

    copies = {g.name: len(g.members[-1].indices[0]) for g in result.deps.groups}
    assert sorted(copies[name] for name in result.plan.kept) == [1, 2, 3]
    assert result.report.verify_max_error < 1e-9


def test_what_an_index_points_at_goes_with_it():
    """A score, its place in one_hot and the column that reads it: verified with the rest kept."""
    config = fg.Config(sparsity=0.3, method="magnitude", kinds=("head",), check=True)

    result = fg.prune(Calls(one_hot).eval(), X, None, config)

    (group,) = result.plan.kept
    members = {(m.parameter, m.dim) for m in result.deps[group].members}
    assert members == {("a.weight", 0), ("a.bias", 0), ("b.weight", 1)}
    assert result.model.b.weight.shape == (5, len(result.plan.kept[group]))


@pytest.mark.parametrize("name", FROZEN)
def test_what_cannot_go_says_why(name):
    model, reason = FROZEN[name]

    deps = fg.analyze(model.eval(), X, check=True)

    mine = [g for g in deps.groups if any(m.parameter == "a.weight" for m in g.members)]
    assert {g.kind for g in mine} == {"frozen"}, deps.listing()
    assert any(reason in g.reason for g in mine), [g.reason for g in mine]


def test_a_choice_in_each_block_says_so():
    best = Calls(lambda m, x: m.b(m.a(x).view(6, 2, 4).topk(2)[1].flatten(1).float()), b=(4, 5))

    told = fg.analyze(best.eval(), X, check=True).explain("a.weight")

    assert "chosen by topk in each block · node %topk" in told
    assert "help: whole units may go where the choice is made over all" in told


def test_blocks_shrink_where_the_values_chosen_in_each_are_all_that_is_used():
    best = Calls(lambda m, x: m.b(m.a(x).view(6, 2, 4).topk(2)[0].flatten(1)), b=(4, 5)).eval()

    (group,) = (g for g in fg.analyze(best, X, check=True).groups if g.name == "a.0")
    pruned = fg.prune(
        best, X, [X] * 2, fg.Config(sparsity=0.2, kinds=("head",), method="magnitude")
    )

    assert (group.kind, group.size, group.blocks, group.least) == ("head", 8, 2, 4)
    assert len(pruned.plan.kept["a.0"]) == 6
    assert pruned.report.verify_max_error < 1e-9


class Quantised(nn.Module):
    """The nearest entries of a table that forward makes once and keeps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(7, 8), nn.Linear(8, 5)
        self.register_buffer("total", torch.randn(16, 5))
        self.made = None

    @property
    def table(self):
        if self.made is None:
            self.made = self.total / 3
        return self.made

    def forward(self, x):
        y = self.b(torch.relu(self.a(x)))
        return y + torch.cdist(y, self.table).softmax(-1) @ self.table


def test_a_table_that_forward_keeps_takes_part_in_the_proof():
    model = nn.Sequential(nn.Identity(), Quantised())
    model(X)  # from here on the table is a plain tensor

    result = fg.prune(model, X, None, fg.Config(sparsity=0.2, method="magnitude"))

    assert result.report.verify_max_error < 1e-9 and len(result.plan.kept["1.a.0"]) < 8
    assert torch.allclose(result.model(X), result.graph_module(X), atol=1e-5)


class Conditioned(nn.Module):
    """A convolution whose kernels are mixed for each image: batch and channels share an axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kernels = nn.Parameter(torch.randn(4, 8, 6, 3, 3) * 0.2)
        self.choose, self.last = nn.Linear(6, 4), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        n, c, h, w = x.shape
        share = self.choose(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("be,eoikl->boikl", share, self.kernels).reshape(n * 8, 6, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n).view(n, 8, h, w)
        return self.last(torch.relu(y))


def attention_layer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    return nn.Sequential(nn.Linear(5, 8), layer).eval()


def sloped_attention():
    """A slope for each head, written for each head of each sequence."""

    def attend(m, x):
        parts = m.a(x).unflatten(-1, (3, 4, 2)).permute(2, 0, 3, 1, 4).flatten(1, 2)
        slopes = torch.arange(4).repeat(x.shape[0])[:, None, None] * torch.arange(x.shape[1])
        y = (parts[0] @ parts[1].mT - slopes).softmax(-1) @ parts[2]
        return m.b(y.unflatten(0, (x.shape[0], 4)).transpose(1, 2).flatten(2))

    return Calls(attend, a=(5, 24)).eval()


@pytest.mark.parametrize(
    ("build", "shape", "kind"),
    [
        (Conditioned, (6, 9, 9), "chain"),
        (attention_layer, (3, 5), "head"),
        (sloped_attention, (3, 5), "head"),
    ],
)
def test_the_graph_takes_other_batches_where_an_axis_holds_batch_and_units(build, shape, kind):
    model, draw = build(), torch.Generator().manual_seed(0)
    config = fg.Config(sparsity=0.3, kinds=(kind,), method="magnitude")

    result = fg.prune(model, torch.randn(2, *shape, generator=draw), None, config)

    ((group, kept),) = result.plan.kept.items()
    assert len(kept) < result.deps[group].size
    x = torch.randn(5, *shape, generator=draw)
    assert torch.allclose(result.graph_module(x), result.model(x), atol=1e-5)


class Pairs(nn.Module):
    """Complex rotary positions on parts of one product, whose rows get odd lengths."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 48), nn.Linear(16, 8)

    def turned(self, y):
        turns = torch.arange(y.shape[1])[:, None, None] * 0.1 ** torch.arange(4)
        pairs = torch.view_as_complex(y.float().reshape(*y.shape[:-1], 4, 2))
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(turns), turns)).flatten(3)

    def forward(self, x):
        q, k, v = self.a(x).view(*x.shape[:2], 2, 24).split(8, -1)
        q, k, v = (y.transpose(1, 2) for y in (self.turned(q), self.turned(k), v))
        return self.b(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_complex_pairs_stand_beside_rows_of_any_length():
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 6, 8, generator=draw) for _ in range(3)]

    result = fg.prune(Pairs(), batches[0], batches, fg.Config(sparsity=0.05, method="fasp"))

    assert result.graph_module.a.weight.shape[0] % 2 == 0
    assert len(result.plan.kept[result.report.groups[0].name]) % 4 == 2  # 7 of 8 in each head
    assert torch.allclose(result.graph_module(batches[1]), result.model(batches[1]), atol=1e-5)


def test_a_model_that_takes_only_positive_numbers_is_proved_on_its_own():
    def logarithm(m, x):
        return m.b(torch.relu(m.a(torch.log(x))))

    positive = X.abs() + 0.1
    result = fg.prune(Calls(logarithm), positive, None, fg.Config(sparsity=0.2, method="magnitude"))

    assert result.report.verify_max_error < 1e-9 and len(result.plan.kept["a.0"]) < 8
    assert result.emission.ways == {"a.0": "native"}


class Windows(nn.Module):
    """Attention in windows: one reshape merges the windows and takes the product apart."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):  # [images, rows, columns, 2, 2, 8]
        n, h, w, s, _, c = x.shape
        q, k, v = self.a(x).reshape(n, h * w, s * s, 3, 2, c // 2).permute(3, 0, 1, 4, 2, 5)
        y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3)
        return self.b(y.reshape(n, h, w, s, s, -1))


@pytest.mark.parametrize("kind", ["chain", "bilinear", "head"])
def test_a_product_is_taken_apart_where_windows_are_merged(kind):
    x = torch.randn(2, 2, 3, 2, 2, 8, generator=torch.Generator().manual_seed(0))
    config = fg.Config(sparsity=0.3, kinds=(kind,), method="magnitude")

    result = fg.prune(Windows(), x, None, config)

    assert result.report.verify_max_error < 1e-9
    assert any(group.kept < group.units for group in result.report.groups)
    assert torch.allclose(result.graph_module(x), result.model(x), atol=1e-5)


def shuffled(m, x):
    order = torch.rand(len(x), 8, device=x.device).argsort(0)
    return m.b(torch.relu(m.a(x)).gather(0, order) + 0.1 * torch.randn(len(x), 8))


def test_what_a_forward_draws_at_random_is_alike_on_both_sides():
    """The noise of the compact graph is that of the dense one: as many numbers, then gathered."""
    config = fg.Config(sparsity=0.4, method="magnitude", check=True)

    pruned = fg.prune(Calls(shuffled).eval(), X, None, config)

    assert pruned.report.verify_max_error < 1e-9


@pytest.mark.parametrize("equation", ["bii->bi", "bii->b", "bii,i->bi"])
def test_a_diagonal_that_einsum_reads_stays(equation):
    def read(m, x):
        operands = [m.a(x).view(-1, 4, 4), *([m.scale.weight[0]] if "," in equation else [])]
        read = torch.einsum(equation, *operands).view(len(x), -1)
        return m.c(torch.relu(m.b(read)))

    width = 1 if equation.endswith("->b") else 4
    layers = {"a": (7, 16), "b": (width, 8), "c": (8, 5), "scale": (4, 1)}
    model = Calls(read, **layers).eval()

    told = fg.analyze(model, X).explain("a.weight")
    pruned = fg.prune(model, X, None, fg.Config(sparsity=0.3, method="magnitude"))

    assert "fixed by einsum · node %einsum" in told and "test_rare_ops.py" in told
    assert [group.name for group in pruned.report.groups] == ["b.0"]
