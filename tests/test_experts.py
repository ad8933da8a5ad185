"""Each expert keeps its own best units; what experts share keeps the same positions in all."""

import copy
from types import SimpleNamespace

import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
import models_zoo
from fasp_graph.exports.program import program_of
from passes.experts import arranged, independent, stacked
from passes.groups import Member
from passes.observe import Moments
from passes.restore import restore

EXPERTS, WIDTH, INNER = 3, 6, 10


class Routed(nn.Module):
    """Experts picked by an index, one matrix for each; `shared` adds the hidden units of all."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, INNER, WIDTH))
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER))
        self.shared = shared

    def forward(self, x):
        ids = self.router(x).argmax(-1)
        h = torch.bmm(self.up[ids], x[:, :, None])
        if self.shared:
            h = h + torch.einsum("eic,tc->ti", self.up, x)[:, :, None]
        return torch.bmm(self.down[ids], torch.relu(h)).squeeze(-1)


def data(count=8, rows=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, WIDTH, generator=generator).double() for _ in range(count)]


def without(model, units):
    """The dense model with what each expert loses zeroed in its consumer."""
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for expert, kept in enumerate(units):
            gone = sorted(set(range(INNER)) - set(kept))
            dense.down[expert][:, gone] = 0
    return dense


@pytest.mark.parametrize(("blocks", "stands"), [(1, True), (2, False)])
def test_experts_with_heads_inside_choose_together(blocks, stands):
    members = [Member("up", 1, ()), Member("down", 2, ())]
    group = SimpleNamespace(kind="chain", blocks=blocks, consumers=(1,), members=members)
    deps = SimpleNamespace(parameters={"up": (3, 10, 6), "down": (3, 6, 10)})

    assert stacked(group, deps) is stands


def test_each_expert_keeps_its_own_heaviest_units():
    model, x = Routed().double().eval(), data()[0]
    pruned = fg.prune(model, x, None, fg.Config(method="magnitude", sparsity=0.4))
    ((name, units),) = pruned.plan.experts.items()
    keep = len(pruned.plan.kept[name])
    for expert in range(EXPERTS):
        heavy = model.down[expert].norm(dim=0).argsort(descending=True)[:keep]
        assert units[expert] == sorted(heavy.tolist())
    assert len({tuple(own) for own in units}) > 1
    y = data()[5]
    torch.testing.assert_close(pruned.model(y), without(model, units)(y), rtol=0, atol=1e-12)
    assert pruned.plan.to_dict()["experts"] == {name: units}


@pytest.mark.parametrize("method", ["wanda", "random"])
def test_without_repair_the_rest_is_as_it_was(method):
    model = Routed().double().eval()
    pruned = fg.prune(model, data()[0], data(), fg.Config(method=method, sparsity=0.4))
    (units,) = pruned.plan.experts.values()
    y = data()[5]
    torch.testing.assert_close(pruned.model(y), without(model, units)(y), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("method", ["fasp", "slimgpt", "best"])
def test_each_expert_is_scored_and_repaired_on_the_tokens_sent_to_it(method):
    model, batches = Routed().double().eval(), data()
    pruned = fg.prune(model, batches[0], batches, fg.Config(method=method, sparsity=0.4))
    (units,) = pruned.plan.experts.values()
    tokens = torch.cat(batches)
    ids = model.router(tokens).argmax(-1)
    for expert, kept in enumerate(units):
        x = torch.relu(tokens[ids == expert] @ model.up[expert].T).float()
        mask = torch.zeros(INNER, dtype=torch.bool)
        mask[kept] = True
        moments = Moments(x.T @ x, x.mean(0), len(x))
        repair = "fasp" if method == "fasp" else "obs"  # no bias: `affine` is `obs` here
        wanted = restore(repair, model.down[expert].detach(), None, moments, mask, 1e-2).weight
        found = pruned.model.down[expert]
        torch.testing.assert_close(found, wanted[:, mask].to(found.dtype), rtol=1e-4, atol=1e-4)
    (group,) = [g for g in pruned.report.groups if g.name in pruned.plan.experts]
    assert 0 < group.error_after < group.error_before


def test_an_expert_that_no_token_reached_goes_by_its_weights():
    model = Routed().double().eval()
    with torch.no_grad():
        model.router.bias[2] = -1e9
    pruned = fg.prune(model, data()[0], data(), fg.Config(method="fasp", sparsity=0.4))
    ((name, units),) = pruned.plan.experts.items()
    heavy = model.down[2].norm(dim=0).argsort(descending=True)[: len(units[2])]
    assert units[2] == sorted(heavy.tolist())
    torch.testing.assert_close(pruned.model.down[2], model.down[2][:, units[2]])
    (note,) = pruned.report.notes
    assert "no calibration token reaches down[2], so that nothing is repaired there" in note


@pytest.mark.parametrize("method", ["fasp", "wanda", "best"])
def test_experts_that_saw_zeros_or_nothing_go_by_their_weights(method):
    model = Routed().double().eval()
    with torch.no_grad():
        model.up.zero_()
        model.router.bias[2] = -1e9
    pruned = fg.prune(model, data()[0], data(), fg.Config(method=method, sparsity=0.4))
    (units,) = pruned.plan.experts.values()
    for expert, kept in enumerate(units):
        heavy = model.down[expert].norm(dim=0).argsort(descending=True)[: len(kept)]
        assert kept == sorted(heavy.tolist())
        assert torch.equal(pruned.model.down[expert], model.down[expert][:, kept])
    notes = " ".join(pruned.report.notes)
    assert "token reaches down[2]" in notes and "only zeros reach down[0], down[1]" in notes


def test_units_that_experts_share_keep_the_same_positions():
    model, x = Routed(shared=True).double().eval(), data()[0]
    deps = fg.analyze(model, x)
    (group,) = [g for g in deps.groups if g.kind == "chain"]
    assert stacked(group, deps)
    graph = program_of(model, ((x,), {}), None).module()
    assert independent(graph, [group], deps, ((x,), {}), 0) == []
    pruned = fg.prune(model, x, data(), fg.Config(method="fasp", sparsity=0.4))
    assert pruned.plan.experts == {} and pruned.report.verify_max_error < 1e-9


def test_arranging_moves_all_that_a_unit_owns():
    weight = torch.arange(2 * 6).reshape(2, 6)
    halves = Member("w", 1, torch.tensor([[0, 3], [1, 4], [2, 5]]).numpy())
    found = arranged(weight, halves, [[2, 0, 1], [0, 1, 2]])
    assert found.tolist() == [[2, 0, 1, 5, 3, 4], [6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss", "deepseek-v3", "moe"])
def test_the_zoos_experts_keep_their_own(name):
    entry, known = program(name)
    batches, config = [entry.inputs] * 8, fg.Config(sparsity=0.4)
    pruned = fg.prune(entry.model, entry.inputs, batches, config, program=known)
    assert pruned.plan.experts and pruned.report.verify_max_error < 1e-9
    assert all(len({tuple(own) for own in units}) > 1 for units in pruned.plan.experts.values())


def test_experts_in_half_precision_keep_their_own():
    entry = models_zoo.load("mixtral")
    model = copy.deepcopy(entry.model).bfloat16()
    pruned = fg.prune(model, entry.inputs, [entry.inputs] * 4, fg.Config(method="fasp"))
    assert pruned.plan.experts and pruned.model.dtype == torch.bfloat16


def test_an_interrupted_run_goes_on_with_the_same_experts(tmp_path):
    entry, known = program("mixtral")
    config, batches = fg.Config(method="fasp", sparsity=0.4), [entry.inputs] * 4
    asked = (entry.model, entry.inputs, batches, config)
    whole = fg.prune(*asked, program=known, work=tmp_path)
    sorted(tmp_path.glob("*.safetensors"))[-1].unlink()  # as if killed before the last stop
    resumed = fg.prune(*asked, program=known, work=tmp_path)
    assert resumed.plan == whole.plan
    weights = resumed.graph_module.state_dict()
    assert all(torch.equal(weights[n], w) for n, w in whole.graph_module.state_dict().items())
