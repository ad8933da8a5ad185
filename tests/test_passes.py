"""The verbs on small models of a user's own."""

import ast
import copy
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from programs_of_zoo import program
from torch import nn

from fasp_graph import Config, analyze, prune
from passes import rules
from passes.capture import capture
from passes.errors import (
    BudgetError,
    CalibrationError,
    CaptureError,
    ConfigError,
    FaspGraphError,
    VerificationError,
)
from passes.observe import Moments
from passes.restore import restore
from passes.rewrite import removal, rewrite
from passes.score import score
from passes.select import allocate
from passes.verify import difference, verify
from passes.views import View
from passes.visit import op_name

ROOT = Path(__file__).parent.parent


def moments(x):
    return Moments(x.T @ x, x.mean(0), len(x))


def test_passes_never_import_fasp_graph():
    for path in (ROOT / "passes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.startswith("fasp_graph") for a in node.names), path
            elif isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("fasp_graph"), path


def test_rule_strings():
    axes = rules.parse("... i, o i, o? -> ... o; mixed o")

    assert axes.operands == (("...", "i"), ("o", "i"), ("o",))
    assert axes.outputs == (("...", "o"),)
    assert axes.kinds == {"o": "mixed"}


def test_mlp_is_two_chains(mlp):
    deps = analyze(mlp, torch.randn(3, 7))

    chains = [g for g in deps.groups if g.kind == "chain"]
    assert [(g.size, [m.parameter for m in g.members]) for g in chains] == [
        (16, ["0.weight", "0.bias", "2.weight"]),
        (12, ["2.weight", "2.bias", "4.weight"]),
    ]
    assert "reaches the model's output" in deps.explain("4.weight")
    assert "the input" in deps.explain("0.weight")
    assert set(deps.to_networkx().nodes) == set(dict(mlp.named_parameters()))


def test_explain_names_close_parameters(mlp):
    with pytest.raises(FaspGraphError, match=r"0\.weight"):
        analyze(mlp, torch.randn(3, 7)).explain("weight")


class Unknown(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(torch.renorm(self.a(x), 2, 0, 1.0))


def test_a_tied_weight_is_told_under_each_of_its_names():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    model.append(nn.Linear(8, 9, bias=False))
    model[4].weight = model[0].weight

    deps = analyze(model.eval(), torch.randint(0, 9, (3, 5)))

    assert deps.explain("0.weight") == deps.explain("4.weight")
    assert "summed away" in deps.explain("0.weight")
    assert set(deps.to_networkx()) == set(deps.parameters)


def test_an_unknown_op_freezes_with_its_name_and_line():
    deps = analyze(Unknown(), torch.randn(3, 6))

    reasons = [g.reason for g in deps.groups if g.members[0].parameter == "a.weight"]
    assert any("no axis rule for aten" in r and "test_passes.py" in r for r in reasons)
    assert not [g for g in deps.groups if g.kind == "chain"]


def test_the_repair_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator, dtype=torch.float64)
    x[:, 3] = x[:, 0] - 2 * x[:, 1]
    w = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    keep = torch.tensor([True, True, True, False, True, True])

    result = restore("fasp", w, None, moments(x), keep, 0.0)

    exact = torch.linalg.lstsq(x[:, keep], x @ w.T).solution.T
    assert torch.allclose(result.weight[:, keep], exact, atol=1e-10)
    assert result.error_after < 1e-12 < result.error_before


def test_affine_repair_carries_the_mean():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64) + 3
    w = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    bias, keep = torch.zeros(2, dtype=torch.float64), torch.tensor([True, False, True, True])

    result = restore("affine", w, bias, moments(x), keep, 0.0)

    design = torch.cat([x[:, keep], torch.ones(len(x), 1, dtype=torch.float64)], 1)
    exact = torch.linalg.lstsq(design, x @ w.T).solution
    assert torch.allclose(result.weight[:, keep].T, exact[:-1], atol=1e-8)
    assert torch.allclose(result.bias, exact[-1], atol=1e-8)
    only_bias = restore("bias", w, bias, moments(x), keep, 0.0)
    assert torch.allclose(only_bias.bias, w[:, 1] * x[:, 1].mean(), atol=1e-10)
    assert result.error_after < only_bias.error_after < only_bias.error_before


def test_scores_follow_their_formulas():
    x, w = torch.randn(50, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    generator = torch.Generator()

    def of(method):
        return score(method, w, moments(x), generator)

    assert torch.allclose(of("fasp"), w.abs().sum(0) * x.norm(dim=0))
    assert torch.allclose(of("wanda_l2"), w.norm(dim=0) * x.norm(dim=0))
    assert torch.allclose(of("magnitude"), w.norm(dim=0))
    assert torch.allclose(of("flap"), x.var(0, correction=0) * w.square().sum(0))
    assert of("random").shape == (5,)


@pytest.mark.parametrize("method", ["fasp", "magnitude", "flap", "wanda", "random"])
def test_prune_meets_the_budget_and_keeps_the_model(mlp, method):
    state = {k: v.clone() for k, v in mlp.state_dict().items()}
    batches = [torch.randn(20, 7) for _ in range(3)]

    pruned = prune(mlp, torch.randn(3, 7), batches, Config(sparsity=0.4, method=method))

    assert all(torch.equal(v, mlp.state_dict()[k]) for k, v in state.items())
    report = pruned.report.to_dict()
    assert report["verify_max_error"] <= 1e-9
    assert abs(report["sparsity"] - 0.4) < 0.05
    assert report["params_after"] == sum(p.numel() for p in pruned.model.parameters())
    x = torch.randn(9, 7)
    assert torch.allclose(pruned.model(x), pruned.graph_module(x), atol=1e-6)


def test_restoration_lowers_the_error(mlp):
    batches = [torch.randn(64, 7) for _ in range(3)]

    groups = prune(mlp, torch.randn(3, 7), batches, Config(sparsity=0.5)).report.groups

    assert all(g.error_after < g.error_before for g in groups)


def test_same_seed_gives_the_same_plan_and_weights(mlp):
    batches = [torch.randn(64, 7) for _ in range(3)]

    first, second = (prune(mlp, batches[0][:3], batches, Config(sparsity=0.5)) for _ in range(2))

    assert first.plan == second.plan
    for left, right in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_infeasible_budgets_state_the_largest(mlp):
    with pytest.raises(BudgetError, match="is the largest"):
        prune(mlp, torch.randn(3, 7), None, Config(sparsity=0.99, method="magnitude"))


@pytest.mark.parametrize("calibration", [[], 3, None, torch.randn(3, 7)])
def test_bad_calibration(mlp, calibration):
    with pytest.raises(CalibrationError):
        prune(mlp, torch.randn(3, 7), calibration, Config(sparsity=0.3))


def test_calibration_of_another_form(mlp):
    with pytest.raises(CalibrationError, match=r"batch 0 is .* but the model was captured with"):
        prune(mlp, torch.randn(3, 7), [(torch.randn(3, 7), torch.randn(3, 7))], Config())


def test_non_finite_activations_name_the_consumer(mlp):
    with pytest.raises(CalibrationError, match=r"non-finite.*2\.weight"):
        prune(mlp, torch.randn(3, 7), [torch.full((3, 7), float("nan"))], Config())


@pytest.mark.parametrize(
    "wrong",
    [{"sparsity": 0.0}, {"sparsity": 1.0}, {"method": "x"}, {"score": "x"}, {"kinds": ("w",)}],
)
def test_wrong_options(wrong):
    with pytest.raises(ConfigError):
        Config(**wrong)


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_data_dependent_branches_are_refused():
    with pytest.raises(CaptureError, match="branch"):
        analyze(Branches(), torch.randn(3, 7))


def test_a_wrong_weight_is_caught_and_named(mlp):
    from passes.couple import couple
    from passes.labels import propagate

    program = capture(mlp, torch.randn(3, 7))
    labels = propagate(program.graph_module, program.inputs)
    deps = couple(labels, dict(program.graph_module.named_parameters()))
    group = next(g for g in deps.groups if g.kind == "chain")
    cut = removal(deps, {group.name: tuple(range(8))})
    compact = rewrite(program.graph_module, cut)
    with torch.no_grad():
        compact.get_parameter("2.weight")[:] += 1e-3

    with pytest.raises(VerificationError, match="first diverging"):
        verify(program.graph_module, compact, cut, program.inputs)


def test_sizes_of_the_example_alone_are_not_enough(mlp):
    program = capture(mlp, torch.randn(3, 7))
    compact = copy.deepcopy(program.graph_module)
    (last,) = compact.graph.output_node().args[0]
    with compact.graph.inserting_after(last):
        rows = compact.graph.call_function(torch.ops.aten.slice.Tensor, (last, 0, 0, 3))
    last.replace_all_uses_with(rows, lambda user: user is not rows)
    compact.recompile()
    cut = removal(analyze(mlp, torch.randn(3, 7)), {})

    with pytest.raises(VerificationError, match="differ by inf"):
        verify(program.graph_module, compact, cut, program.inputs)


class DoubleUse(nn.Module):
    """One producer, two consumers, and a gate."""

    def __init__(self):
        super().__init__()
        self.up, self.gate = nn.Linear(6, 10), nn.Linear(6, 10)
        self.left, self.right = nn.Linear(10, 4), nn.Linear(10, 3)

    def forward(self, x):
        h = torch.sigmoid(self.gate(x)) * self.up(x)
        return self.left(h), self.right(h)


def test_a_group_with_two_consumers_is_repaired_in_both():
    torch.manual_seed(0)

    pruned = prune(DoubleUse(), torch.randn(3, 6), [torch.randn(50, 6)], Config(sparsity=0.4))

    (group,) = pruned.report.groups
    assert group.kept < 10 and group.error_after < group.error_before


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.d = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.g, self.c = nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 5, 1)

    def forward(self, x):
        return self.c(torch.relu(self.g(torch.relu(self.d(self.a(x))))))


def test_depthwise_and_grouped_convolutions():
    torch.manual_seed(0)

    pruned = prune(
        Grouped(), torch.randn(3, 3, 9, 9), None, Config(sparsity=0.4, method="magnitude")
    )

    x = torch.randn(2, 3, 9, 9)
    assert pruned.report.verify_max_error <= 1e-9
    assert torch.allclose(pruned.model(x), pruned.graph_module(x[:2]), atol=1e-5)


@pytest.mark.parametrize(
    ("n", "outputs", "groups", "found"),
    [
        (1, 12, 2, [("before", 8), ("grouped", 6)]),
        (2, 12, 4, [("before", 4), ("grouped", 3)]),
        (3, 6, 2, [("before", 8), ("grouped", 3)]),
        (2, 16, 16, [("before", 16)]),
        (1, 32, 16, [("before", 16)]),
        (1, 4, 4, [("before", 4)]),
    ],
    ids=["1d", "2d", "3d", "depthwise", "multiplied", "one each"],
)
def test_transposed_convolutions_in_groups(n, outputs, groups, found):
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{n}d")
    transposed = getattr(nn, f"ConvTranspose{n}d")
    layers = {
        "before": conv(3, 16, 1),
        "relu": nn.ReLU(),
        "grouped": transposed(16, outputs, 3, stride=2, groups=groups),
        "tanh": nn.Tanh(),
        "after": conv(outputs, 5, 1),
    }
    model = nn.Sequential(OrderedDict(layers)).double()
    x = torch.randn(3, 3, *[4] * n, dtype=torch.float64)

    pruned = prune(model, x, None, Config(sparsity=0.4, method="magnitude"))

    chains = [group for group in pruned.deps.groups if group.kind == "chain"]
    assert [(group.name.split(".")[0], group.size) for group in chains] == found
    assert all(len(pruned.plan.kept[group.name]) < group.size for group in chains)
    assert pruned.report.verify_max_error <= 1e-9
    assert torch.allclose(pruned.model(x), pruned.graph_module(x), atol=1e-9)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(3, 4, 3, stride=2, padding=1), (2, 3, 9)),
        (nn.Conv1d(3, 4, 4, padding="same", dilation=2), (2, 3, 9)),
        (nn.Conv2d(3, 4, (2, 3), padding="valid"), (2, 3, 7, 8)),
        (nn.Conv3d(3, 4, 2, stride=(1, 2, 1), padding=(1, 0, 1)), (2, 3, 4, 5, 6)),
    ],
    ids=["strided", "same", "valid", "3d"],
)
def test_a_convolution_is_its_matrix_times_its_rows(layer, shape):
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x)

    x = torch.randn(shape)
    program = capture(Wrapped(), x)
    node = next(n for n in program.graph_module.graph.nodes if op_name(n).startswith("conv"))
    view = View(node, "layer.weight", 1, node.args[0], 1)

    y = view.rows(x, layer.weight) @ view.matrix(layer.weight).T + layer.bias

    assert torch.allclose(y, view.outputs(layer(x)), atol=1e-5)


@pytest.mark.parametrize("name", ["llama-random", "mixtral"])
@pytest.mark.parametrize("kinds", [("head",), ("width",), ("chain", "head")])
def test_heads_experts_and_width_are_pruned_by_the_driver(name, kinds):
    entry, known = program(name)
    config = Config(sparsity=0.12, method="fasp", kinds=kinds)

    result = prune(entry.model, entry.inputs, entry.calibration, config, program=known)

    assert {group.kind for group in result.report.groups} == set(kinds)
    assert result.report.params_after < result.report.params_before
    assert result.report.verify_max_error < 1e-9
    if "width" not in kinds:  # experts too leave the class's own code, by its count of them
        assert {"graph", "padded"}.isdisjoint(result.emission.ways.values())


def test_experts_stay_as_the_router_and_the_grouped_product_want_them():
    deps = program("mixtral")[1].deps
    experts = [g for g in deps.groups if g.least > g.blocks]

    assert experts and all(group.kind == "head" and group.least == 2 for group in experts)
    weights = {member.parameter for group in experts for member in group.members}
    assert any("experts" in name for name in weights) and any("gate" in name for name in weights)
    inside = [g for g in deps.groups if g.kind == "chain" and g.members[0].parameter in weights]
    keep = allocate(deps, inside, 0.3).keep  # of 48; a third would be 16
    assert inside and {keep[g.name] for g in inside} <= {24, 32}


class Masked(nn.Module):
    """Its outputs are -inf at some places, dense and compact alike."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 12), nn.Linear(12, 4)

    def forward(self, x):
        y = self.down(torch.relu(self.up(x)))
        return y.masked_fill(torch.tensor([False, True, False, False]), float("-inf"))


def test_outputs_with_infinities_verify():
    result = prune(Masked(), torch.randn(3, 5), None, Config(method="magnitude"))

    assert result.report.verify_max_error < 1e-9
    nan, inf = torch.tensor([float("nan")]), torch.tensor([float("inf")])
    assert difference(nan, nan) == float("inf") == difference(inf, -inf)


def conv(*sizes, **options):
    return nn.Conv1d(*sizes, **options)


@pytest.mark.parametrize(
    ("between", "symmetry"),
    [
        ([], "invertible"),
        ([nn.ReLU()], "permutation"),
        ([conv(12, 12, 3, groups=12)], "permutation"),
    ],
    ids=["nothing", "bent", "depthwise"],
)
def test_what_may_be_inserted_between_two_layers(between, symmetry):
    model = nn.Sequential(conv(5, 12, 1), *between, conv(12, 4, 1))
    (chain,) = [g for g in analyze(model, torch.randn(2, 5, 9)).groups if g.kind == "chain"]

    assert chain.symmetry == symmetry
