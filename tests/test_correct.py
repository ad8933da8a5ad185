"""The step of all consumers at once, never taken where held-out rows speak against it."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fasp_graph import Config, analyze, prune
from fasp_graph.correction import correction_cost, fitted_on, held_out, sensed_on
from fasp_graph.pages.report_page import report_page
from fasp_graph.prune import read
from passes.capture import as_args, capture
from passes.consumers import linears, offset_of, views
from passes.correct import Sample, Site, _outputs, apart, correct, vocabularies
from passes.observe import environments
from passes.removal import nodes_by_name
from passes.rewrite import attribute
from passes.sensitivity import run


class Words(nn.Module):
    """Ids in, logits over the same ids out, through one MLP."""

    def __init__(self, outputs=11):
        super().__init__()
        self.table, self.up = nn.Embedding(11, 8), nn.Linear(8, 24)
        self.down, self.head = nn.Linear(24, 8), nn.Linear(8, outputs)

    def forward(self, ids):
        x = self.table(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


@pytest.fixture(scope="module")
def scene():
    """A model whose MLP lost 12 of 24 units without a repair: what `correct` needs to know."""
    torch.manual_seed(0)
    model = Words().eval()
    ids = torch.randint(11, (6, 9))
    captured = capture(model, ids)
    module = captured.graph_module
    deps = analyze(model, ids)
    (group,) = [g for g in deps.groups if g.kind == "chain" and g.size == 24]
    (view,) = views(group, deps, nodes_by_name(module.graph.nodes))
    keep = torch.arange(24) < 12
    weights = {"down.weight": model.down.weight.detach() * keep}

    def read(name):
        return weights.get(name, attribute(module, name).detach())

    def samples(number):
        with torch.no_grad():
            made = [(x, model(x)) for x in torch.randint(11, (number, 6, 9))]
        return [Sample(as_args(x), lambda y=y: [y]) for x, y in made]

    return module, read, [Site(view, offset_of(view), keep)], samples


def test_a_step_lowers_the_distance_and_leaves_removed_columns_at_zero(scene):
    module, read, sites, samples = scene

    found = correct(module, read, sites, [samples(4), samples(4)], samples(2))

    first, second = (dict(tried) for tried in found.steps)
    assert min(first.values()) < 0.8 * first[0.0]
    assert second[0.0] == min(first.values()) > min(second.values())
    least = [first[0.0], min(first.values()), min(second.values())]
    assert found.distances == pytest.approx([distance / first[0.0] for distance in least])
    assert set(found.weights) == {"down.weight", "down.bias"}
    assert found.weights["down.weight"][:, 12:].abs().max() == 0
    assert found.weights["down.weight"][:, :12].sub(read("down.weight")[:, :12]).abs().max() > 1e-4


def test_no_step_is_taken_where_held_out_rows_want_another(scene):
    module, read, sites, samples = scene
    already = [Sample(s.batch, lambda s=s: _outputs(module, s.batch, read)) for s in samples(2)]

    found = correct(module, read, sites, [samples(4)], already)

    assert found.weights == {}
    assert all(lost > 0 for rate, lost in found.steps[0] if rate)


def test_no_step_is_taken_from_what_is_not_finite(scene):
    module, read, sites, samples = scene

    def broken(name):
        return read(name) * (torch.inf if name == "up.weight" else 1)

    found = correct(module, broken, sites, [samples(2)], samples(1))

    assert found.weights == {}


def by_hand(dense, pruned, keep, fits, held):
    """The steps of one layer y = W x as the module defines them, in float64: its weight at the end
    and, of every step, D at each rate.
    """

    def lost(weight, x):
        return float((x @ (weight - dense).T).square().sum() / (2 * (x @ dense.T).square().mean()))

    def solved(second, share):
        return torch.linalg.inv(second + share * second.diagonal().mean() * torch.eye(len(second)))

    weight, cross, steps, seen, felt = pruned, torch.zeros_like(pruned), [], [], []
    for x in fits:
        g = x @ (weight - dense).T / (x @ dense.T).square().mean()
        seen, felt, cross = [*seen, x], [*felt, g], g.T @ x + cross / 2
        rows, power = torch.cat(seen), torch.cat(felt).square().mean(0).diag()
        second, step = (rows.T @ rows / len(rows))[keep][:, keep], torch.zeros_like(weight)
        step[:, keep] = -solved(power, 0.1) @ cross[:, keep] / len(x) @ solved(second, 0.02)
        slope = float((cross * step).sum()) / len(x)
        rates = [0.0, *(share * -lost(weight, x) / len(x) / slope for share in (0.5, 1.0))]
        steps.append({rate: lost(weight + rate * step, held) for rate in rates})
        weight = weight + min(rates, key=steps[-1].get) * step
    return weight, steps


def test_steps_are_newtons_with_momentum_and_the_moments_of_all_tokens_so_far():
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(6, 4, bias=False).double()
    mixing = torch.randn(4, 6, generator=generator, dtype=torch.float64)  # four columns tell all
    first, second, third, held = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64) @ mixing
        for n in (60, 20, 30, 50)
    )
    with torch.no_grad():
        nn.init.normal_(layer.weight, generator=generator)
        layer.weight.mul_(torch.tensor([[0.2], [1.0], [3.0], [0.5]]))  # outputs count unequally
    dense, keep = layer.weight.detach(), torch.tensor([True, True, False, True, True, False])
    module = capture(layer, held[:3]).graph_module
    (view,) = linears(module)
    *fits, sample = [
        Sample(as_args(x), lambda x=x: [x @ dense.T]) for x in (first, second, third, held)
    ]

    found = correct(
        module, lambda _: dense * keep, [Site(view, None, keep)], [[f] for f in fits], [sample]
    )

    weight, steps = by_hand(dense, dense * keep, keep, (first, second, third), held)
    assert all(min(tried, key=tried.get) for tried in steps)  # each step is taken
    close = {"rtol": 1e-4, "atol": 1e-5}  # sums and outputs are compared in float32
    torch.testing.assert_close(found.weights["weight"], weight, **close)
    for tried, exact in zip(found.steps, steps, strict=True):
        torch.testing.assert_close(
            torch.tensor(tried), torch.tensor(list(exact.items())), check_dtype=False, **close
        )


@pytest.mark.parametrize(("outputs", "form"), [(11, "kl"), (5, "squares")])
@pytest.mark.parametrize("elements", [2**24, 100])
def test_outputs_over_the_vocabulary_are_compared_as_distributions(
    outputs, form, elements, monkeypatch
):
    monkeypatch.setattr("passes.correct.ELEMENTS", elements)
    model, ids = Words(outputs).eval(), torch.randint(11, (6, 9))
    words = vocabularies(capture(model, ids).graph_module)
    dense, other = torch.randn(6, 9, outputs), torch.randn(6, 9, outputs, requires_grad=True)

    found, slopes = apart([other], [dense], words)

    logs = [x.log_softmax(-1) for x in (other, dense)]
    exact = {
        "kl": F.kl_div(*logs, log_target=True, reduction="sum"),
        "squares": (other - dense).square().sum() / (2 * dense.square().mean()),
    }
    assert words == {11}
    assert found == pytest.approx(float(exact[form]), rel=1e-5)
    torch.testing.assert_close(slopes, list(torch.autograd.grad(exact[form], other)))
    same, none = apart([dense], [dense], words)
    assert same == pytest.approx(0, abs=1e-5) and none == []


def test_where_one_output_is_over_the_vocabulary_the_others_have_no_say():
    dense, other = torch.randn(6, 11), torch.randn(6, 11, requires_grad=True)
    beside = torch.randn(6, 4, requires_grad=True)

    both, slopes = apart([beside, other], [beside + 1, dense], frozenset({11}))

    alone, (slope,) = apart([other], [dense], frozenset({11}))
    assert both == alone and torch.equal(slopes[1], slope)
    assert torch.equal(slopes[0], torch.zeros(6, 4))


def test_values_are_dropped_after_their_last_use():
    model = nn.Sequential(*(layer for _ in range(12) for layer in (nn.Linear(8, 8), nn.ReLU())))
    x = torch.randn(6, 8)
    module, alive, most = capture(model, x).graph_module, weakref.WeakSet(), []

    def watch(node, value, result):
        alive.add(result)
        most.append(len(alive))
        return result

    with torch.no_grad():
        (output,) = run(
            module, *environments(module, [as_args(x)]), lambda n: attribute(module, n), watch
        )

    torch.testing.assert_close(output, model(x))
    assert len(most) == 24 and max(most) <= 2


def drawn(batch, scale):
    """Words that speak `scale` times as surely, and batches to calibrate on."""
    torch.manual_seed(0)
    model = Words().eval()
    with torch.no_grad():
        model.head.weight *= scale
    return model, [torch.randint(11, (batch, 9)) for _ in range(16)]


def test_best_ends_nearer_to_the_dense_model_than_without_the_step():
    model, batches = drawn(24, 4)
    unseen = torch.randint(11, (40, 9))

    def lost(restore):
        small = prune(model, batches[0], batches, Config(sparsity=0.5, restore=restore))
        with torch.no_grad():
            gap, _ = apart([small.model(unseen)], [model(unseen)], frozenset({11}))
        return gap, small.report

    (after, best), (before, plain) = lost(None), lost("residual")

    assert best.forward_passes == pytest.approx(3.8125)  # up and head read the stream
    assert after < 0.7 * before
    assert best.distances[0] == 1 > best.distances[1] > best.distances[2]
    told = " -> ".join(f"{share:.3g}" for share in best.distances)
    said = f"\nsteps of all layers, distance from the dense outputs: {told}"
    assert said in best.to_text()
    page = report_page("words", best.to_dict(), {})
    assert f"<td>{told.replace('->', '→')}</td>" in page
    assert not plain.distances and "steps of" not in plain.to_text()


def test_steps_that_help_nothing_are_told():
    model, batches = drawn(6, 1)

    report = prune(model, batches[0], batches, Config(sparsity=0.5)).report

    assert set(report.distances) == {1.0}
    assert any(note.startswith("no step of all layers brought") for note in report.notes)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("count", range(1, 70))
def test_no_batch_is_used_twice_and_four_passes_are_enough(count, dense):
    sensed, held = sensed_on(count, Config()), held_out(count)
    used = [*sensed, *held, *(number for fit in fitted_on(count, dense) for number in fit)]

    assert len(used) == len(set(used)) and max(used) < count
    assert 1 + dense + 3 * len(sensed) / count + correction_cost(count, dense) <= 4 or count < 4
    assert bool(fitted_on(count, dense)) == (count >= 8)


class Normed(Words):
    """The stream is normed, so that it stays as wide as it is, and the head's inputs with it."""

    def forward(self, ids):
        x = self.table(ids)
        return self.head(F.layer_norm(x + self.down(torch.relu(self.up(x))), (8,)))


def test_a_step_moves_producers_but_no_table_and_no_head_over_the_vocabulary():
    torch.manual_seed(0)
    model = Normed().eval()
    batches = [torch.randint(11, (6, 9)) for _ in range(16)]
    program = read(model, batches[0])

    def moved(restore):
        found = prune(model, batches[0], batches, Config(restore=restore), program=program)
        return found.graph_module.state_dict(), found.plan.kept

    (new, kept), (old, same) = moved(None), moved("residual")
    assert kept == same
    assert not torch.equal(new["up.weight"], old["up.weight"])
    assert torch.equal(new["table.weight"], old["table.weight"])
    assert torch.equal(new["head.weight"], old["head.weight"])


class Layers(nn.Module):
    """Layers of each kind; `twice` has two uses, `tied` is a table as well, `deep` is grouped."""

    def __init__(self):
        super().__init__()
        self.tied, self.twice = nn.Embedding(8, 8), nn.Linear(8, 8)
        self.plain, self.conv = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)
        self.deep, self.back = nn.Conv1d(8, 8, 1, groups=8), nn.ConvTranspose1d(8, 8, 1)
        self.free = nn.Parameter(torch.randn(8, 8))

    def forward(self, ids):
        x = self.plain(self.twice(self.twice(self.tied(ids)))) @ self.free
        x = self.back(self.deep(self.conv(x.mT))).mT
        return x @ self.tied.weight.mT


def test_layers_with_a_weight_of_their_own_may_move():
    captured = capture(Layers().eval(), torch.randint(8, (3, 5)))
    for node in captured.graph_module.graph.nodes:
        node.meta.clear()  # as of nodes that a pass made

    found = {view.parameter: view.dim for view in linears(captured.graph_module)}

    assert found == {"plain.weight": 1, "conv.weight": 1, "free": 0}


def test_a_convolution_of_one_sample_alone():
    layers = [nn.Conv1d(3, 16, 3), nn.ReLU(), nn.Conv1d(16, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3)]
    model, batches = nn.Sequential(*layers).eval(), [torch.randn(3, 40) for _ in range(20)]

    alone = prune(model, batches[0], batches, Config(0.3))
    within = [sample[None] for sample in batches]
    expected = prune(model, within[0], within, Config(0.3))

    assert not any("derivative" in note for note in alone.report.notes)
    assert alone.plan == expected.plan
    for name, weight in expected.model.state_dict().items():
        torch.testing.assert_close(alone.model.state_dict()[name], weight)
