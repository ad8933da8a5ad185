"""Greedy elimination, the metric of the outputs, allocation by error and the dense target."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
from fasp_graph import Config, analyze, prune, worth
from fasp_graph.config import METHODS
from fasp_graph.worth import Job, problems_of, utility_of
from passes.allocate import allocate_by_error
from passes.capture import as_args, capture
from passes.consumers import offset_of, unit_columns, views
from passes.drift import Drift, drift, twin
from passes.eliminate import Problem, _candidates, _state, eliminate
from passes.errors import CalibrationError
from passes.observe import Moments, Walk, environments
from passes.removal import nodes_by_name
from passes.restore import restore
from passes.score import interactions, last_masked, score
from passes.select import allocate
from passes.sensitivity import factor, sense


def problem(units, per, rest, out, seed):
    """Correlated columns; units' columns are scattered."""
    generator = torch.Generator().manual_seed(seed)
    size = units * per + rest

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(4 * size, size) @ normal(size, size)
    unit = torch.full((size,), -1)
    unit[: units * per] = torch.arange(units).repeat(per)
    unit = unit[torch.randperm(size, generator=generator)]
    second = x.T @ x / len(x) + 1e-3 * torch.eye(size, dtype=torch.float64)
    return Problem(normal(out, size), second, unit)


def joint_error(problems, units):
    """sum over consumers of tr(W_P [(S^-1)_PP]^-1 W_P^T), computed at once."""
    total = 0.0
    for p in problems:
        gone = torch.isin(p.unit_of, torch.tensor(sorted(units)))
        own = torch.linalg.inv(p.second)[gone][:, gone]
        total += float(torch.trace(p.weight[:, gone] @ torch.linalg.inv(own) @ p.weight[:, gone].T))
    return total


@pytest.mark.parametrize(
    ("per", "rest", "consumers", "blocks"), [(1, 0, 1, 1), (1, 5, 2, 1), (3, 0, 1, 4), (9, 2, 1, 1)]
)
@pytest.mark.parametrize("batch", [2, 32])
@pytest.mark.parametrize("even", [False, True])
def test_the_running_sum_is_the_exact_error(per, rest, consumers, blocks, batch, even):
    problems = [problem(24, per, rest, 7 - i, i) for i in range(consumers)]
    block_of = [unit % blocks for unit in range(24)]

    found = eliminate(problems, block_of, 12 // blocks, even, batch)

    assert len(set(found.order)) == 12
    assert found.errors[-1] == pytest.approx(joint_error(problems, found.order), rel=1e-9)
    assert found.errors[4] == pytest.approx(joint_error(problems, found.order[:5]), rel=1e-9)
    for block in range(blocks):
        assert sum(unit % blocks == block for unit in found.order) == 12 // blocks


def test_each_step_takes_the_least_joint_error():
    problems = [problem(10, 2, 0, 5, 3)]

    found = eliminate(problems, [0] * 10, 6)

    for step in range(6):
        gone = list(found.order[:step])
        rivals = {u: joint_error(problems, [*gone, u]) for u in range(10) if u not in gone}
        assert min(rivals, key=rivals.get) == found.order[step]


def test_even_elimination_serves_the_blocks_in_turn():
    found = eliminate([problem(24, 1, 0, 5, 0)], [unit // 6 for unit in range(24)], 4, even=True)

    for round_ in range(4):
        served = [unit // 6 for unit in found.order[4 * round_ : 4 * round_ + 4]]
        assert sorted(served) == [0, 1, 2, 3]


def test_every_block_has_candidates_for_its_turn():
    weight = torch.arange(1.0, 25, dtype=torch.float64).diag()
    state = _state(Problem(weight, torch.eye(24, dtype=torch.float64), torch.arange(24)), 24)
    block = torch.arange(24) // 12  # all of block 0 costs less than any of block 1

    even, all_ = (
        _candidates([state], torch.ones(24, dtype=torch.bool), block, 2, 2, even, False)
        for even in (True, False)
    )

    assert even.tolist() == [0, 1, 2, 3, 12, 13, 14, 15]
    assert all_.tolist() == list(range(8))


def test_a_curve_is_of_shapes_that_lose_equally_much_of_each_block(monkeypatch):
    weight = torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=torch.float64).diag()
    held = Problem(weight, torch.eye(6, dtype=torch.float64), torch.arange(6))
    monkeypatch.setattr(worth, "problems_of", lambda *_: [held])
    monkeypatch.setattr(worth, "_dense", lambda _: None)
    group = SimpleNamespace(name="a", size=6, blocks=2, block_of=np.array([0, 0, 0, 1, 1, 1]))
    job = SimpleNamespace(config=Config(), rotatable=frozenset())

    found = worth._curve(job, group, {})

    assert found == (0.0, 1.0 + 16.0, 1.0 + 16.0 + 4.0 + 25.0)


def test_a_duplicated_column_goes_for_nothing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 5, generator=generator, dtype=torch.float64)
    x = torch.cat([x, x[:, 2:3]], 1)
    weight = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    second = x.T @ x / len(x) + 1e-9 * torch.eye(6, dtype=torch.float64)

    found = eliminate([Problem(weight, second, torch.arange(6))], [0] * 6, 2)

    assert found.order[0] in (2, 5) and found.order[1] not in (2, 5)
    assert found.errors[0] < 1e-7 < found.errors[1]


class Linear3(nn.Module):
    """Linear all through, so that the metric is known in closed form."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


def sites(model, inputs):
    captured = capture(model, inputs)
    deps = analyze(model, inputs)
    groups = [g for g in deps.groups if g.kind == "chain"]
    nodes = nodes_by_name(captured.graph_module.graph.nodes)
    return captured, deps, groups, {g.name: views(g, deps, nodes) for g in groups}


def test_the_metric_is_the_gram_matrix_of_the_jacobian():
    torch.manual_seed(0)
    model, inputs = Linear3().double(), torch.randn(3, 5, dtype=torch.float64)
    captured, _, groups, found = sites(model, inputs)
    view = found[groups[0].name][0]
    batches = [as_args(torch.randn(4000, 5, dtype=torch.float64)) for _ in range(4)]

    sensed = sense(captured.graph_module, batches, [view], 0, True)[view.node.name]

    with torch.no_grad():
        power = torch.cat([model(*args[0]) for args in batches]).square().mean()
    exact = model.c.weight.T @ model.c.weight / power
    assert torch.allclose(
        sensed.metric.double(), exact, atol=0.05 * float(exact.detach().abs().max())
    )
    rows = torch.cat([model.a(*args[0]) for args in batches]).float()
    assert torch.allclose(sensed.moments.gram, rows.T @ rows, rtol=1e-3)


class Outputs(nn.Module):
    """Two outputs, each in a unit of its own."""

    def __init__(self, *units):
        super().__init__()
        self.units, self.up = units, nn.Linear(5, 8)
        self.down, self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 3)

    def forward(self, x):
        h = self.down(torch.relu(self.up(x)))
        return self.units[0] * self.first(h), self.units[1] * self.second(h)


def test_the_metric_does_not_depend_on_the_units_of_the_outputs():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    metrics = []
    for units in ((1.0, 1.0), (64.0, 0.125)):  # powers of two: exact
        torch.manual_seed(0)
        captured, _, groups, found = sites(Outputs(*units).double(), x[:3])
        (view,) = found[groups[0].name]

        sensed = sense(captured.graph_module, [as_args(x)], [view], 0, True)

        metrics.append(sensed[view.node.name].metric)
    assert torch.equal(*metrics) and metrics[0].diagonal().min() > 0


@pytest.fixture
def scene():
    """A linear model, what every step knows of it, and its first group and consumer."""
    torch.manual_seed(0)
    model, x = Linear3().double(), torch.randn(50, 5, dtype=torch.float64)
    captured, deps, (group, *_), found = sites(model, x[:3])
    (view,) = found[group.name]
    sensed = sense(captured.graph_module, [as_args(x)], [view], 0, True)
    config = Config(method="fasp", score="taylor")
    rest = {group.name: [view]}, {}, sensed, torch.Generator()
    return Job(captured, deps, {}, config, *rest), group, view, model.b.weight.detach()


def test_errors_of_units_are_measured_in_the_metric_of_the_outputs(scene):
    job, group, view, weight = scene
    moments, metric = job.sensed[view.node.name].moments, job.sensed[view.node.name].metric
    state = Walk(job.captured.graph_module, [])

    (found,) = problems_of(job, group, {view.node.name: moments}, state)

    metric = metric.double()
    metric += 1e-4 * metric.diagonal().mean() * torch.eye(6)
    torch.testing.assert_close(found.weight.T @ found.weight, weight.T @ metric @ weight)


def test_without_a_metric_they_are_relative_to_the_output_of_the_consumer(scene):
    job, group, view, weight = scene
    moments = job.sensed[view.node.name].moments
    deaf = replace(job, sensed={view.node.name: replace(job.sensed[view.node.name], metric=None)})
    state = Walk(job.captured.graph_module, [])

    (found,) = problems_of(deaf, group, {view.node.name: moments}, state)

    power = torch.trace(weight @ moments.gram.double() @ weight.T) / moments.tokens
    torch.testing.assert_close(found.weight, weight / power.sqrt())


def test_a_run_scores_by_taylor_in_the_metric_of_the_outputs(scene):
    job, group, view, weight = scene
    moments, metric = job.sensed[view.node.name].moments, job.sensed[view.node.name].metric
    state = Walk(job.captured.graph_module, [])

    found = utility_of(job, group, {view.node.name: moments}, state)

    power = moments.gram.diagonal().double() / moments.tokens
    torch.testing.assert_close(found, (weight.T @ metric.double() @ weight).diagonal() * power)


def test_factor_maps_errors_into_the_metric():
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    metric, error = half.T @ half, torch.randn(4, 9, generator=generator, dtype=torch.float64)

    found = (factor(metric, 1e-12) @ error).square().sum()

    assert found == pytest.approx(float(torch.trace(error.T @ metric @ error)), rel=1e-6)


def test_allocation_takes_from_the_cheap_group(mlp):
    inputs = torch.randn(3, 7)
    _, deps, groups, _ = sites(mlp, inputs)
    uniform = allocate(deps, groups, 0.4)
    dear, cheap = groups
    curves = {dear.name: [float(k) for k in range(16)], cheap.name: [0.01 * k for k in range(12)]}

    found = allocate_by_error(deps, groups, uniform, curves, 0.4)

    assert 0.4 <= found.sparsity < 0.5
    assert found.keep[dear.name] / dear.size > found.keep[cheap.name] / cheap.size
    assert found.keep[cheap.name] < uniform.keep[cheap.name]


def test_allocation_respects_align_and_min_keep(mlp):
    _, deps, groups, _ = sites(mlp, torch.randn(3, 7))
    uniform = allocate(deps, groups, 0.4)
    curves = {g.name: [float(k) for k in range(g.size)] for g in groups}

    found = allocate_by_error(deps, groups, uniform, curves, 0.4, align=4, min_keep=4)

    assert all(count % 4 == 0 and count >= 4 for count in found.keep.values())
    assert found.sparsity >= 0.4


def test_refitting_towards_the_dense_path_is_least_squares():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, w, bias = normal(300, 5) + 1, normal(3, 5), normal(3)
    target = x @ w.T + bias + normal(300, 3) + 2
    gap = target - x @ w.T - bias
    keep = torch.tensor([True, False, True, True, True])
    moments = Moments(x.T @ x, x.mean(0), 300)

    result = restore("asymmetric", w, bias, moments, keep, 0.0, Drift(gap.T @ x, gap.mean(0), 300))

    design = torch.cat([x[:, keep], torch.ones(300, 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(design, target).solution
    assert torch.allclose(result.weight[:, keep].T, exact[:-1], atol=1e-8)
    assert torch.allclose(result.bias, exact[-1], atol=1e-8)


class Residual(nn.Module):
    """Two blocks on a residual stream."""

    def __init__(self):
        super().__init__()
        self.up1, self.down1 = nn.Linear(6, 12), nn.Linear(12, 6)
        self.up2, self.down2 = nn.Linear(6, 12), nn.Linear(12, 6)

    def forward(self, x):
        x = x + self.down1(torch.relu(self.up1(x)))
        return x + self.down2(torch.relu(self.up2(x)))


def test_drift_is_target_minus_output():
    torch.manual_seed(0)
    model, x = Residual().double(), torch.randn(50, 6, dtype=torch.float64)
    captured, _, groups, found = sites(model, x[:3])
    view = found[groups[1].name][0]
    changed = {"down1.weight": model.down1.weight.detach() * 0.5}
    state = Walk(captured.graph_module, list(environments(captured.graph_module, [as_args(x)])))
    state.weights.update(changed)
    with torch.no_grad():
        calls = [n for n in captured.graph_module.graph.nodes if n.op == "call_function"]
        state.run(calls[: calls.index(view.node)])
        dense = twin(captured.graph_module, [as_args(x)])
        moved = x + torch.relu(model.up1(x)) @ changed["down1.weight"].T + model.down1.bias
        inner = torch.relu(model.up2(moved))
        exact = model(x) - (moved + model.down2(inner))

        result = drift(state, dense, view, residual=True)

    assert torch.allclose(result.cross, exact.T @ inner, rtol=1e-4, atol=1e-3)
    assert torch.allclose(result.mean, exact.mean(0), atol=1e-5)
    assert exact.abs().max() > 0.1


def test_units_of_a_convolution_own_their_kernels():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    _, _, groups, found = sites(model, torch.randn(2, 3, 9, 9))

    unit = unit_columns(groups[0], found[groups[0].name][0], model[2].weight)

    assert unit.tolist() == [channel for channel in range(4) for _ in range(9)]


def test_a_batch_norm_is_the_bias_of_a_convolution_without_one():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)
    ).eval()
    nn.init.normal_(model[3].running_mean)
    batches = [torch.randn(4, 3, 9, 9) for _ in range(4)]

    pruned = prune(model, batches[0], batches, Config(sparsity=0.4, restore="affine"))

    x = torch.cat(batches)
    with torch.no_grad():
        before, after = model(x).mean((0, 2, 3)), pruned.model(x).mean((0, 2, 3))
    assert not torch.equal(model[3].running_mean, pruned.model[3].running_mean)
    assert torch.allclose(before, after, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_norm_of_two_convolutions_is_no_bias(shared):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Conv2d(3, 8, 1)
            self.a, self.b = (nn.Conv2d(8, 5, 1, bias=False) for _ in range(2))
            self.norm, self.other = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

        def forward(self, x):
            x = torch.relu(self.up(x))
            return self.norm(self.a(x)) + (self.norm if shared else self.other)(self.b(x))

    _, _, groups, found = sites(Twice().eval(), torch.randn(2, 3, 4, 4))

    offsets = [offset_of(view) for view in found[groups[0].name]]
    assert [o and o.name for o in offsets] == (
        [None, None] if shared else ["norm.running_mean", "other.running_mean"]
    )


class Branch(nn.Module):
    """The units of `a` are used twice: at once, and behind a block that is pruned too."""

    def __init__(self):
        super().__init__()
        self.a, self.up = nn.Linear(6, 10), nn.Linear(10, 14)
        self.down, self.out = nn.Linear(14, 10), nn.Linear(10, 4)

    def forward(self, x):
        h = torch.relu(self.a(x))
        return self.out(h + self.down(torch.relu(self.up(h))))


def test_a_later_consumer_is_fitted_to_the_inputs_that_it_will_see():
    torch.manual_seed(0)
    model = Branch()
    batches = [torch.randn(80, 6) for _ in range(4)]
    seen = []
    config = Config(0.4, allocation="uniform", restore="asymmetric", ridge=0.0)

    pruned = prune(model, batches[0], batches, config)

    pruned.model.out.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.cat(batches)
    with torch.no_grad():
        gap = model(x) - pruned.model(x)
    inputs = torch.cat([seen[0], torch.ones(len(x), 1)], 1)
    assert seen[0].shape[1] < 10 and pruned.model.up.out_features < 14
    assert gap.abs().max() > 1e-3
    assert (gap.T @ inputs).abs().max() / len(x) < 1e-4


@pytest.mark.parametrize("method", list(METHODS))
def test_every_preset_prunes_a_convolution(method):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(inplace=True)
    )
    batches = [torch.randn(4, 3, 9, 9) for _ in range(4)]

    pruned = prune(model.eval(), batches[0], batches, Config(sparsity=0.4, method=method))

    assert pruned.report.groups[0].kept < 8
    assert pruned.report.verify_max_error <= 1e-9


def test_best_reports_its_curves_and_its_cost():
    torch.manual_seed(0)
    batches = [torch.randn(40, 6) for _ in range(4)]

    report = prune(Residual(), batches[0], batches, Config(sparsity=0.4)).report.to_dict()

    assert report["forward_passes"] == pytest.approx(3.75)
    for group in report["groups"]:
        curve = group["curve"]
        assert len(curve) == group["units"] and curve[0] == 0.0
        assert all(later >= earlier for earlier, later in zip(curve, curve[1:], strict=False))


@pytest.mark.parametrize(
    ("rows", "cost", "repair"), [(40, 3.75, "cut"), (4, 3.5, "halved"), (1, 4.0, "affine")]
)
def test_a_single_batch_costs_no_more_than_four_passes(rows, cost, repair):
    torch.manual_seed(0)
    batch = torch.randn(rows, 30, 6) if rows == 1 else torch.randn(rows, 6)
    example = batch if rows == 1 else batch[:3]

    report = prune(Residual(), example, [batch], Config(sparsity=0.4)).report

    assert report.forward_passes == pytest.approx(cost), repair


def test_taylor_is_the_error_in_the_metric_of_the_outputs():
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(3, 5, generator=generator), torch.randn(70, 5, generator=generator)
    metric = torch.randn(3, 3, generator=generator)
    metric = metric @ metric.T

    found = score("taylor", w, Moments(x.T @ x, x.mean(0), 70), generator, metric)

    cut = x[:, :, None] * w.T  # [tokens, column, out]: what each column adds
    exact = torch.einsum("tjo,op,tjp->j", cut, metric, cut) / 70
    assert torch.allclose(found, exact.double(), rtol=1e-4)


def test_numerical_knows_that_two_columns_cancel():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator)
    x = torch.cat([x, x[:, :1]], 1)
    w = torch.tensor([[3.0, 1.0, 1.1, -3.0]])  # columns 0 and 3 are large, and add up to nothing
    unit = torch.arange(4)

    m = interactions(w, Moments(x.T @ x, x.mean(0), 200), unit, 4)

    assert float(m[[0, 3]][:, [0, 3]].sum()) == pytest.approx(0, abs=1e-3)
    assert float(m.sum()) == pytest.approx(float((x @ w.T).square().sum()), rel=1e-5)
    pair = torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0], [0.0, 0.0, 10.0]])
    assert last_masked(pair).tolist() == [0, 1, 2]


def test_influence_cuts_a_block_that_turns_the_stream_less():
    torch.manual_seed(0)
    model = Residual().double()
    with torch.no_grad():
        model.down1.weight.mul_(0.01)
        model.down1.bias.zero_()
        model.down2.weight.mul_(10)
    batches = [torch.randn(40, 6, dtype=torch.float64) for _ in range(4)]
    config = Config(sparsity=0.4, method="slimgpt", allocation="influence")

    report = prune(model, batches[0][:3], batches, config).report

    first, second = (group.kept for group in report.groups)
    assert first < second
    assert report.sparsity == pytest.approx(0.4, abs=0.05)
    assert report.forward_passes == pytest.approx(1.5)


@pytest.mark.parametrize("name", ["taylor", "numerical"])
def test_scores_that_need_more_than_columns_run_without_allocation(name):
    torch.manual_seed(0)
    batches = [torch.randn(40, 6) for _ in range(4)]
    config = Config(sparsity=0.4, method="fasp", score=name)

    report = prune(Residual(), batches[0][:3], batches, config).report

    assert report.forward_passes == pytest.approx(2.5 if name == "taylor" else 1.0)
    assert all(group.error_after < group.error_before for group in report.groups)


def test_presets_that_need_no_data_cost_nothing(mlp):
    report = prune(mlp, torch.randn(3, 7), None, Config(method="magnitude")).report

    assert report.forward_passes == 0


def test_a_model_whose_output_has_no_gradient_falls_back_to_relative_errors():
    class Argmax(Residual):
        def forward(self, x):
            return super().forward(x).argmax(-1)

    torch.manual_seed(0)
    batches = [torch.randn(40, 6) for _ in range(4)]

    report = prune(Argmax(), batches[0], batches, Config(sparsity=0.4)).report

    assert all(group.curve[-1] <= 1.0 for group in report.groups)
    assert report.verify_max_error <= 1e-9


def test_best_without_calibration_says_what_needs_it(mlp):
    with pytest.raises(CalibrationError, match="allocation=sensitivity"):
        prune(mlp, torch.randn(3, 7), None, Config())


def test_best_beats_every_preset_on_heldout_text():
    entry, known = program("llama")
    rows = entry.heldout[:12]

    def after(method):
        config = Config(sparsity=0.3, method=method)
        small = prune(entry.model, entry.inputs, entry.calibration[:2], config, program=known)
        return fg.perplexity(small.model, rows), small.report.sparsity

    (best, removed), (fasp, paper), (slim, _) = (after(m) for m in ("best", "fasp", "slimgpt"))
    assert removed >= paper - 1e-3
    assert fg.perplexity(entry.model, rows) < best < slim < fasp
