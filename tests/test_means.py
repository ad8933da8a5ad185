"""Chains that pass a norm by mean squares: what goes is zero there, and is still counted."""

import functools
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fasp_graph as fg
import passes.gates
from fasp_graph.prune import read
from passes import rules
from passes.capture import capture
from passes.removal import removal
from passes.rewrite import rewrite
from passes.verify import verify

KEPT = [0, 2, 3, 7, 8, 11]


class Mlp(nn.Module):
    """up -> norm -> down, with the norms that models of transformers have there."""

    def __init__(self, way, eps=1e-3):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.eps = way, eps
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.gain = nn.Parameter(torch.rand(12) + 0.5)

    def norm(self, y):
        if self.way == "fused":
            return F.rms_norm(y, (12,), self.gain, self.eps)
        if self.way == "response":
            size = torch.linalg.vector_norm(y, dim=1, keepdim=True)
            return y + self.gain * y * size / (size.mean(-1, keepdim=True) + self.eps)
        return self.gain * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        return self.down(self.norm(torch.relu(self.up(x))))


def data(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeroed(model, kept):
    """The same module with the rows of `up` that go at zero: relu and norm keep zeros."""
    gone = [k for k in range(12) if k not in kept]
    with torch.no_grad():
        for tensor in (model.up.weight, model.up.bias):
            tensor[gone] = 0
    return model


@pytest.mark.parametrize("eps", [1e-3, None])
@pytest.mark.parametrize("way", ["plain", "fused", "response"])
def test_the_compact_norm_counts_what_is_gone_as_zeros(way, eps):
    if eps is None and way != "fused":
        pytest.skip("only the fused op has a default")
    model = Mlp(way, eps).double()
    captured = capture(model, data(0, 2, 5, 8).double())
    deps = fg.analyze(model, data(0, 2, 5, 8).double(), check=True)
    (chain,) = [group for group in deps.groups if group.kind == "chain"]
    cut = removal(deps, {chain.name: KEPT})
    compact = rewrite(captured.graph_module, cut)
    x = data(1, 3, 4, 8).double()

    found = compact(x)

    assert compact.up.weight.shape == (6, 8)
    assert torch.allclose(found, zeroed(model, KEPT)(x), atol=1e-12)
    assert verify(captured.graph_module, compact, cut, captured.inputs) < 1e-12
    assert [mean.node for mean in chain.means] == ["rms_norm" if way == "fused" else "mean"]
    assert "under a mean at %" in deps.explain("up.weight")


class Stream(nn.Module):
    """A residual stream between norms: weights write to it after others have read it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        x = self.first(x)
        x = x + self.down(torch.relu(self.up(F.rms_norm(x, (8,)))))
        return self.last(F.rms_norm(x, (8,)))


def test_a_residual_stream_stays_width_and_its_norm_sees_what_stays():
    model, x = Stream().double(), data(1, 4, 6).double()
    deps = fg.analyze(model, x, check=True)
    stream = deps["first.0"]
    assert stream.kind == "width" and stream.means == () and "mixed by rms_norm" in stream.reason
    captured = capture(model, x)
    kept = [0, 1, 4, 5, 6]
    compact = rewrite(captured.graph_module, removal(deps, {"first.0": kept}))

    narrow = Stream().double()  # the class at the new width: its norm divides by 5
    for layer, rows in (("first", True), ("up", False), ("down", True), ("last", False)):
        held = getattr(narrow, layer)
        held.weight = nn.Parameter(held.weight[kept] if rows else held.weight[:, kept])
        held.bias = nn.Parameter(held.bias[kept]) if rows else held.bias
    y = narrow.first(x)
    y = y + narrow.down(torch.relu(narrow.up(F.rms_norm(y, (5,)))))
    assert torch.allclose(compact(x), narrow.last(F.rms_norm(y, (5,))), atol=1e-12)


class Heads(nn.Module):
    """Attention whose output is normed over all heads at once."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(8, 48), nn.Linear(16, 8)
        self.gain = nn.Parameter(torch.rand(16) + 0.5)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.gain * y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-3))


def test_channels_and_whole_heads_under_one_norm_go_together():
    model, x = Heads().double(), data(1, 2, 5, 8).double()
    deps, captured = fg.analyze(model, x, check=True), capture(model, x)
    chain = next(g for g in deps.groups if g.kind == "chain")
    heads = next(g for g in deps.groups if g.kind == "head")
    inside = [u for u in range(chain.size) if u % 4 != 1]  # each head loses one channel
    cut = removal(deps, {heads.name: [0, 2, 3], chain.name: inside})

    compact = rewrite(captured.graph_module, cut)

    assert verify(captured.graph_module, compact, cut, captured.inputs) < 1e-12
    assert compact.out.weight.shape == (8, 9)


def batches(count=6):
    return [data(seed, 4, 5, 8) for seed in range(count)]


@pytest.mark.parametrize("method", ["fasp", "best"])
@pytest.mark.parametrize("way", ["plain", "fused", "response"])
def test_the_class_computes_the_same(way, method):
    model = Mlp(way)

    result = fg.prune(model, batches(1)[0], batches(), fg.Config(sparsity=0.3, method=method))

    x = data(9, 2, 3, 8)
    assert "graph" not in result.emission.ways.values()
    assert result.model.up.weight.shape[0] < 12
    assert torch.allclose(result.model(x), result.graph_module(x), atol=1e-5)
    assert not any("gate" in name for name, _ in result.graph_module.named_buffers())


def test_the_consumer_takes_off_what_the_norm_adds(monkeypatch):
    model, held = Mlp("plain"), torch.cat([data(seed, 4, 5, 8) for seed in range(20, 40)])

    def distance():
        config = fg.Config(sparsity=0.4, method="fasp")
        result = fg.prune(model, batches(1)[0], batches(), config)
        return float((result.graph_module(held) - model(held)).detach().norm())

    levelled = distance()
    monkeypatch.setattr("fasp_graph.decide.gated", lambda module, groups, deps: (module, {}))

    assert levelled < distance()


def test_gates_are_closed_again_when_a_run_goes_on(tmp_path, monkeypatch):
    model = nn.Sequential(Mlp("plain"), Mlp("fused"))
    config = fg.Config(sparsity=0.3, method="fasp")
    whole = fg.prune(model, batches(1)[0], batches(), config)
    level, calls = passes.gates.level, []

    def interrupted(*args):
        level(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("fasp_graph.walking.level", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fg.prune(model, batches(1)[0], batches(), config, work=tmp_path / "work")
    resumed = fg.prune(model, batches(1)[0], batches(), config, work=tmp_path / "work")

    assert len(calls) == 3  # the first stop was not run again
    held = dict(whole.graph_module.named_parameters())
    for name, tensor in resumed.graph_module.named_parameters():
        assert torch.equal(tensor, held[name]), name


def bitnet():
    """A decoder with a norm in front of each output layer."""
    from transformers import BitNetConfig, BitNetForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    config = BitNetConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return BitNetForCausalLM(config).eval()


@functools.cache
def program_of_bitnet():
    return read(bitnet(), {"input_ids": torch.arange(24).reshape(2, 12)})


@pytest.mark.xdist_group("bitnet")
def test_a_folder_of_such_a_model_loads_elsewhere(tmp_path):
    model = bitnet()
    ids = torch.arange(24).reshape(2, 12)
    calibration = [{"input_ids": (ids * k) % 64} for k in (3, 5, 7, 11)]
    known, config = program_of_bitnet(), fg.Config(sparsity=0.3)
    result = fg.prune(model, {"input_ids": ids}, calibration, config, program=known)
    result.save(tmp_path / "small")
    code = (
        "import fasp_graph, torch, sys; m = fasp_graph.load(sys.argv[1]); "
        "torch.save(m(torch.arange(24).reshape(2, 12)).logits, sys.argv[2])"
    )

    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "logits")],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )

    logits = torch.load(tmp_path / "logits")
    assert torch.allclose(logits, result.model(ids).logits, atol=1e-5)
    assert type(result.model) is type(model)
    assert result.model.generate(ids, max_new_tokens=3).shape == (2, 15)


@pytest.mark.xdist_group("bitnet")
def test_the_uniform_layout_leaves_alone_what_a_class_would_count_anew():
    model = bitnet()
    config = fg.Config(sparsity=0.1, method="magnitude", layout="uniform")
    inputs = {"input_ids": torch.arange(24).reshape(2, 12)}

    with pytest.raises(fg.FaspGraphError, match="layout='free'"):
        fg.prune(model, inputs, None, config, program=program_of_bitnet())


def test_a_custom_op_has_no_mean():
    with pytest.raises(ValueError, match="call the axis mixed"):
        rules.register("fasp_test.average", "b t c -> b c; mean t")


def test_an_axis_that_ends_in_a_mean_can_be_pruned():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up = nn.Linear(8, 12)

        def forward(self, x):
            return torch.tanh(self.up(x)).mean(-1)

    model, x = Average().double(), data(1, 2, 5, 8).double()
    deps, captured = fg.analyze(model, x, check=True), capture(model, x)
    cut = removal(deps, {"up.0": KEPT})

    compact = rewrite(captured.graph_module, cut)

    assert deps["up.0"].kind == "bilinear"
    assert torch.allclose(compact(x), zeroed(model, KEPT)(x), atol=1e-12)


class Net(nn.Module):
    """Layers a, b, c, d of 8 and 12 channels, and a forward that is a function of them and x."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.c = nn.Linear(8, 12), nn.Linear(8, 12)
        self.b, self.d = nn.Linear(12, 8), nn.Linear(12, 8)
        self.gain, self.still = nn.RMSNorm(12), nn.LayerNorm(12)
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


def rms(y):
    return y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-6)


def by_hand(m, x):
    y = torch.relu(m.a(x))
    y = y - y.mean(-1, keepdim=True)
    return m.b(rms(y))


def shifted(m, x):
    y = torch.sigmoid(m.a(x))
    return m.b(y * y.mean(-1, keepdim=True))


@pytest.mark.parametrize("forward", [by_hand, shifted])
def test_numbers_that_are_not_zero_under_a_mean_mix(forward):
    group = fg.analyze(Net(forward), data(1, 4, 8), check=True)["a.0"]

    assert group.kind == "width" and "mixed by mean" in group.reason


def accumulated(m, x):
    y = torch.relu(m.a(x))
    total = y.new_zeros(y.shape[0], 12)
    for place in range(3):
        total = total * 0.5 + y[:, place]
    return m.b(rms(total))


def test_what_is_summed_onto_zeros_stays_zero():
    group = fg.analyze(Net(accumulated), data(1, 4, 3, 8), check=True)["a.0"]

    assert group.kind == "chain" and len(group.means) == 1


def onto_ones(m, x):
    y = torch.relu(m.a(x))
    total = y.new_ones(y.shape[0], 3, 12)
    total[:, 1:] = y[:, 1:]
    return m.b(rms(total))


def test_what_stands_beside_ones_is_none():
    group = fg.analyze(Net(onto_ones), data(1, 4, 3, 8), check=True)["a.0"]

    assert group.kind == "width" and not group.means


def reads(m, x):
    y = torch.relu(m.a(x))
    return m.b(y), y.mean(-1), m.d(torch.relu(m.c(x)))


def whole(m, x):
    y = torch.relu(m.a(x))
    return m.b(y), y.mean(), m.d(torch.relu(m.c(x)))


@pytest.mark.parametrize("forward", [reads, whole])
def test_a_mean_that_goes_elsewhere_ends_the_axis(forward):
    model, x = Net(forward).double(), data(1, 4, 8).double()
    deps, captured = fg.analyze(model, x, check=True), capture(model, x)

    assert deps["a.0"].kind == "bilinear" and deps["a.0"].means == ()
    assert deps["c.0"].kind == "chain"
    cut = removal(deps, {"a.0": KEPT, "c.0": KEPT})
    compact = rewrite(captured.graph_module, cut)
    assert verify(captured.graph_module, compact, cut, captured.inputs) < 1e-12


def before(m, x):
    y = torch.relu(m.a(x))
    return m.b(y) + m.d(rms(y))


def after(m, x):
    y = torch.relu(m.a(x))
    z = m.d(m.gain(y))
    return z + m.b(y)


@pytest.mark.parametrize("method", ["fasp", "best"])
@pytest.mark.parametrize("forward", [before, after])
def test_another_consumer_may_stand_before_or_behind_the_norm(forward, method):
    model = Net(forward)

    result = fg.prune(model, batches(1)[0], batches(), fg.Config(sparsity=0.2, method=method))

    assert result.deps["a.0"].kind == "chain"
    x = data(9, 3, 5, 8)
    assert torch.allclose(result.model(x), result.graph_module(x), atol=1e-5)


def joined(m, x):
    stream = m.a(x)
    y = torch.cat([stream, torch.relu(m.c(m.b(m.still(stream))))], -1)
    return F.rms_norm(y, (24,)) @ m.last


@pytest.mark.parametrize("kept", [{"a": KEPT}, {"c": KEPT}, {"a": KEPT, "c": KEPT[:4]}])
def test_a_mean_counts_one_part_and_not_the_other(kept):
    model, x = Net(joined).double(), data(1, 4, 8).double()
    model.last = nn.Parameter(data(2, 24, 5).double())
    deps, captured = fg.analyze(model, x, check=True), capture(model, x)
    made = {m.parameter: g for g in deps.groups for m in g.members if m.dim == 0}
    a, c = made["a.weight"], made["c.weight"]
    assert (a.kind, c.kind) == ("width", "chain")

    cut = removal(deps, {{"a": a, "c": c}[layer].name: units for layer, units in kept.items()})

    compact = rewrite(captured.graph_module, cut)
    assert verify(captured.graph_module, compact, cut, captured.inputs) < 1e-12


def test_a_budget_for_a_stream_alone_is_counted_on_the_stream():
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 3))
    config = fg.Config(sparsity=0.3, kinds=("width",), method="magnitude")

    result = fg.prune(model, data(1, 4, 6), None, config)

    assert 8 < len(result.plan.kept["0.0"]) < 14


class Empty(nn.Module):
    """Something of no tokens is joined to what shrinks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        y = self.up(x)
        return self.down(torch.cat([y, y.new_zeros(y.shape[0], 0, 12)], 1))


def test_an_empty_constant_narrows_with_what_it_is_joined_to():
    model, x = Empty().double(), data(1, 2, 5, 8).double()
    deps, captured = fg.analyze(model, x, check=True), capture(model, x)
    cut = removal(deps, {"up.0": KEPT})

    compact = rewrite(captured.graph_module, cut)

    assert verify(captured.graph_module, compact, cut, captured.inputs) < 1e-12


def test_a_stream_is_told_without_running_its_ops(monkeypatch):
    monkeypatch.setattr("passes.zeros.Zeros._try", lambda *args: pytest.fail("an op was run"))

    kinds = {g.name: g.kind for g in fg.analyze(Stream(), data(1, 4, 6), check=True).groups}

    assert kinds["first.0"] == "width" and kinds["up.0"] == "chain"
