"""Groups between linear ops may take another basis: the same function, and less error."""

import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fasp_graph as fg
from fasp_graph.config import Config
from fasp_graph.prune import read
from fasp_graph.refit import Turn, refit
from passes.analysis import analysis
from passes.capture import capture
from passes.drift import Drift
from passes.eliminate import Problem, eliminate
from passes.observe import Moments
from passes.restore import restore
from passes.rewrite import attribute
from passes.ridge import held_out_ridge
from passes.rotate import Basis, basis, blocks_of, columns_of, rotatable, turned, turns
from passes.score import score


class Attention(nn.Module):
    """`kv` KV heads for 4 query heads of 6 channels; `packed`: one matrix for Q, K and V."""

    def __init__(self, kv=4, packed=False, bias=True):
        super().__init__()
        self.kv, self.packed = kv, packed
        if packed:
            self.qkv = nn.Linear(24, 24 + 12 * kv, bias)
        else:
            self.q, self.k, self.v = (nn.Linear(24, 6 * n, bias) for n in (4, kv, kv))
        self.o = nn.Linear(24, 24, bias)

    def forward(self, x):
        if self.packed:
            q, k, v = self.qkv(x).split([24, 6 * self.kv, 6 * self.kv], -1)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        q, k, v = (held.unflatten(-1, (-1, 6)).transpose(1, 2) for held in (q, k, v))
        y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.kv < 4)
        return self.o(y.transpose(1, 2).flatten(2))


class Pair(nn.Module):
    """Two linear layers with nothing between; `readers` of the inner axis."""

    def __init__(self, readers=1):
        super().__init__()
        self.down = nn.Linear(24, 16)
        self.ups = nn.ModuleList(nn.Linear(16, 24 + 8 * n, bias=False) for n in range(readers))

    def forward(self, x):
        h = self.down(x)
        return [up(h) for up in self.ups]


class Convolutions(nn.Module):
    """A 1x1 convolution before a 3x3 one."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 3, padding=1)

    def forward(self, x):
        return self.second(self.first(x))


class Bent(nn.Module):
    """Nothing that can be turned."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 16), nn.Linear(16, 24)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


TOKENS, IMAGE = (3, 10, 24), (2, 3, 8, 8)
MODELS = {
    "heads": (Attention, TOKENS, 4),
    "grouped queries": (functools.partial(Attention, 2), TOKENS, 2),
    "packed": (functools.partial(Attention, 2, True), TOKENS, 2),
    "without bias": (functools.partial(Attention, 4, False, False), TOKENS, 4),
    "low rank": (Pair, TOKENS, 1),
    "two readers": (functools.partial(Pair, 2), TOKENS, 1),
    "convolutions": (Convolutions, IMAGE, 1),
}


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(make, shape):
    """Model, captured graph, its analysis; float64."""
    torch.manual_seed(0)
    model = make().double().eval()
    captured = capture(model, drawn(*shape))
    return model, captured, analysis(captured.graph_module, captured.inputs)


def orthogonal(group, seed=1):
    size = group.size // group.blocks
    return torch.linalg.qr(drawn(group.blocks, size, size, seed=seed)).Q


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_any_orthogonal_basis_is_the_same_function(name):
    make, shape, blocks = MODELS[name]
    model, captured, deps = built(make, shape)
    groups = [g for g in deps.groups if g.kind == "chain"]
    before = model(drawn(*shape, seed=5))

    found = rotatable(captured.graph_module, groups, captured.inputs, 0)
    (group,) = [g for g in groups if g.name in found]
    moves = turns([group], {group.name: orthogonal(group)})
    for parameter, move in moves.items():
        held = attribute(model, parameter)
        held.copy_(move(held.clone()))

    assert group.blocks == blocks
    torch.testing.assert_close(model(drawn(*shape, seed=5)), before, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_groups_turn_as_well(dtype):
    model = Attention(2).to(dtype).eval()
    batches = [drawn(*TOKENS, seed=seed).to(dtype) for seed in range(8)]

    pruned = fg.prune(model, batches[0], batches, Config(sparsity=0.25))

    assert [g.rotated for g in pruned.report.groups] == [True]
    assert {p.dtype for p in pruned.model.parameters()} == {dtype}


def test_units_between_which_and_their_consumer_is_a_kink_do_not_turn():
    _, captured, deps = built(Bent, TOKENS)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    assert group.symmetry == "permutation"
    assert rotatable(captured.graph_module, [group], captured.inputs, 0) == frozenset()


def test_a_claim_that_does_not_hold_is_found_out_group_by_group():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.bent, self.pair = Bent(), Pair()

        def forward(self, x):
            return self.bent(x), self.pair(x)

    _, captured, deps = built(Both, TOKENS)
    chains = [g for g in deps.groups if g.kind == "chain"]
    claimed = [dataclasses.replace(g, symmetry="invertible") for g in chains]
    (true,) = [g.name for g in chains if g.symmetry == "invertible"]

    assert rotatable(captured.graph_module, claimed, captured.inputs, 0) == {true}


def problem_of(group, out, seed=0):
    """The consumer of `Pair`, float64, with correlated inputs."""
    x = drawn(400, group.size, seed=seed) @ drawn(group.size, group.size, seed=seed + 1)
    second = x.T @ x / len(x)
    return Problem(drawn(out, group.size, seed=seed + 2), second, torch.arange(group.size))


@pytest.mark.parametrize("joint", [True, False])
def test_in_one_block_the_error_is_that_of_the_best_low_rank_map(joint):
    _, _, deps = built(Pair, TOKENS)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    held = problem_of(group, 24)
    values = torch.linalg.svdvals(held.weight @ torch.linalg.cholesky(held.second))

    found = basis(group, [held], joint)
    errors = eliminate([found.problem(held)], group.block_of.tolist(), 10).errors

    torch.testing.assert_close(found.worth.sort().values, values.square().sort().values)
    best = values.square().sort().values[:10].cumsum(0)
    torch.testing.assert_close(torch.tensor(errors, dtype=torch.float64), best)


@pytest.mark.parametrize("name", ["heads", "grouped queries"])
def test_a_basis_and_its_elimination_lose_less_than_channels(name):
    make, shape, _ = MODELS[name]
    _, _, deps = built(make, shape)
    (group,) = [g for g in deps.groups if g.kind == "chain" and g.symmetry == "invertible"]
    per = 24 // group.size
    unit = torch.arange(group.blocks)[:, None, None] * 6 + torch.arange(6)
    unit = unit.expand(group.blocks, per, 6).reshape(-1)
    x = drawn(400, 24) @ drawn(24, 24, seed=1)
    held = Problem(drawn(24, 24, seed=2), x.T @ x / len(x), unit)
    plain = eliminate([held], group.block_of.tolist(), 3).errors

    joint, apart = (
        eliminate([basis(group, [held], how).problem(held)], group.block_of.tolist(), 3).errors
        for how in (True, False)
    )

    assert max(joint[-1], apart[-1]) < plain[-1]
    if name == "heads":  # with one column in each, no direction costs less than the first
        assert joint[0] < min(apart[0], plain[0])


def test_q_spans_what_the_kept_directions_span():
    _, _, deps = built(Attention, TOKENS)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    found = Basis(group, drawn(4, 6, 6, seed=3), torch.zeros(24))
    kept = [0, 2, 3, 7, 9, 12, 13, 14, 20, 23]

    q = found.orthogonal(kept)

    eye = torch.eye(6, dtype=torch.float64).expand(4, 6, 6)
    torch.testing.assert_close(q.mT @ q, eye)
    stays = torch.zeros(24, dtype=torch.bool)
    stays[kept] = True
    for block, units in enumerate(blocks_of(group)):
        rows = torch.linalg.inv(found.matrix[block])[stays[units]]
        inside = q[block][:, stays[units]]
        torch.testing.assert_close(rows @ inside @ inside.T, rows)


def test_columns_turn_as_units_do():
    _, _, deps = built(functools.partial(Attention, 2), TOKENS)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    unit = torch.tensor([-1, *range(6), *range(6), *range(6, 12), *range(6, 12), -1])
    q, w = orthogonal(group), drawn(3, 26)

    found = turned(w, 1, columns_of(group, unit), q)

    blocks = torch.block_diag(torch.eye(1), q[0], q[0], q[1], q[1], torch.eye(1)).double()
    torch.testing.assert_close(found, w @ blocks)


def test_modegpt_scores_by_ridge_leverage():
    x = drawn(50, 9)
    found = score("modegpt", drawn(4, 9), Moments(x.T @ x, x.mean(0), 50), torch.Generator())

    gram = x.T @ x
    eye = torch.eye(9, dtype=x.dtype)
    wanted = (gram @ torch.linalg.inv(gram + gram.diagonal().mean() * eye)).diagonal()
    torch.testing.assert_close(found, wanted)


@functools.cache
def dense(name):
    """The model, and what was read of it."""
    make, shape, _ = MODELS[name]
    torch.manual_seed(0)
    model = make().double().eval()
    return model, read(model, drawn(*shape))


@functools.cache
def quarter(name, **method):
    """A quarter pruned by a method, the same of all groups."""
    model, known = dense(name)
    batches = [drawn(*MODELS[name][1], seed=seed) for seed in range(40)]
    config = Config(0.25, allocation="uniform", **method)
    return fg.prune(model, batches[0], batches, config, program=known)


@pytest.mark.xdist_group("rotate")  # one capture of each model
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("given", [{"score": "rotation"}, {}, {"method": "modegpt"}], ids=str)
def test_pruned_and_verified_it_is_nearer_to_the_dense_model(name, given):
    model, shape = dense(name)[0], MODELS[name][1]
    pruned = quarter(name, **({"method": "slimgpt", **given} if given else {}))
    plain = quarter(name, method="slimgpt")

    def lost(one):
        y = drawn(*shape, seed=99)
        pair = one.model(y), model(y)
        if isinstance(pair[0], list):
            return sum(float((a - b).square().mean()) for a, b in zip(*pair, strict=True))
        return float((pair[0] - pair[1]).square().mean())

    assert [g.rotated for g in pruned.report.groups] == [True]
    assert "units, 1 of them in a basis of their own\n" in pruned.report.to_text()
    assert [g.rotated for g in plain.report.groups] == [False]
    assert "basis" not in plain.report.to_text()
    assert pruned.report.verify_max_error < 1e-12
    if (
        name != "grouped queries"
    ):  # what two random query heads read of a KV head has no common basis
        assert lost(pruned) < lost(plain)
    assert pruned.report.to_dict()["groups"][0]["rotated"]


class Gated(Pair):
    """A second reader that calibration shuts."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x, gate):
        h = self.down(x)
        return self.ups[0](h), self.ups[1](h * gate)


@torch.no_grad()
def test_a_reader_that_saw_nothing_turns_with_the_others():
    torch.manual_seed(0)
    model = Gated().double().eval()
    shut = torch.zeros(1, dtype=torch.float64)
    batches = [(drawn(*TOKENS, seed=seed), shut) for seed in range(20)]
    config = Config(0.25, "slimgpt", score="rotation")

    pruned = fg.prune(model, batches[0], batches, config)

    (group,) = pruned.report.groups
    assert group.rotated and any("only zeros reach" in note for note in pruned.report.notes)
    rows = pruned.model.down.weight @ torch.linalg.pinv(model.down.weight)  # Q_K^T
    torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows), dtype=rows.dtype))
    torch.testing.assert_close(pruned.model.ups[1].weight, model.ups[1].weight @ rows.T)


@pytest.mark.parametrize("given", [{"restore": "residual"}, {"ridge": "held-out"}], ids=str)
def test_a_refit_in_another_basis_is_that_of_turned_inputs(given):
    _, _, deps = built(Pair, TOKENS)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    columns, q = columns_of(group, torch.arange(16)), orthogonal(group)
    w, bias, keep = drawn(5, 16), drawn(5, seed=1), torch.arange(16) < 11
    x, gap = drawn(60, 16, seed=2) @ drawn(16, 16, seed=3), drawn(60, 5, seed=4)

    def parts(x):
        folds = (x[:20], x[20:]) if "ridge" in given else (x,)
        return [Moments(one.T @ one, one.mean(0), len(one)) for one in folds]

    def moved(x):
        return Drift(gap.T @ x, gap.mean(0), 60) if "restore" in given else None

    config = Config(**{"restore": "affine", **given})
    found, ridges = refit(config, w, bias, parts(x), keep, moved(x), Turn(q, columns))

    y = x @ q[0]
    if ridges:
        assert ridges == (held_out_ridge("affine", w @ q[0], bias, *parts(y), keep),)
        assert ridges != (held_out_ridge("affine", w @ q[0], bias, *parts(y)[::-1], keep),)
    ridge = ridges[0] if ridges else config.damping
    moments = Moments(y.T @ y, y.mean(0), 60)
    wanted = restore(config.restore, w @ q[0], bias, moments, keep, ridge, moved(y))
    torch.testing.assert_close(found.weight, wanted.weight @ q[0].T)
    torch.testing.assert_close(found.bias, wanted.bias)
