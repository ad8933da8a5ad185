"""Weights of which calibration tells nothing: no token reaches them, or only zeros do. Their units
go by weight magnitude, nothing is repaired there, and the report says so. The rest is pruned.
"""

import functools

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.prune import read
from passes.errors import CalibrationError

WIDTH, INNER, UNSEEN = 6, 20, 2
pytestmark = pytest.mark.xdist_group("untold")  # one capture of each model
METHODS = ["best", "fasp", "slimgpt", "flap", "wanda"]


def two_layers():
    return nn.Sequential(nn.Linear(WIDTH, INNER), nn.ReLU(), nn.Linear(INNER, WIDTH))


class Mixture(nn.Module):
    """Experts in a list, each called on the rows that the router sends it: none to one of them."""

    def __init__(self, masked=False):
        super().__init__()
        torch.manual_seed(0)
        self.masked = masked
        self.first, self.router = two_layers(), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(two_layers() for _ in range(3))
        with torch.no_grad():
            self.router.bias[UNSEEN] = -1e9

    def forward(self, x):
        x = x + self.first(x)
        ids, out = self.router(x).argmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if self.masked:
                out[ids == number] = expert(x[ids == number])
                continue
            rows = torch.where(ids == number)[0]
            out = out.index_add(0, rows, expert(x[rows]))
        return out


class Dead(nn.Module):
    """Two branches side by side; one gives zeros for whatever comes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.dead, self.alive = nn.Linear(WIDTH, INNER), nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(2 * INNER, WIDTH)
        with torch.no_grad():
            self.dead.bias.fill_(-1e9)

    def forward(self, x):
        return self.down(torch.relu(torch.cat([self.dead(x), self.alive(x)], -1)))


class Readers(nn.Module):
    """One chain that two layers read: one of them on rows of which there are none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.left = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
        self.right = nn.Linear(INNER, WIDTH)

    def forward(self, x):
        h = torch.relu(self.up(x))
        rows = torch.where(x[:, 0] > 1e9)[0]
        return self.left(h).index_add(0, rows, self.right(h[rows]))


def data(count=8, rows=40):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, WIDTH, generator=generator).double() for _ in range(count)]


@functools.cache
def dense(make, *given):
    """The model, and what was read of it."""
    model = make(*given).double().eval()
    return model, read(model, data()[0])


def pruned_of(make, batches, *given, **options):
    model, known = dense(make, *given)
    return fg.prune(model, data()[0], batches, fg.Config(**options), program=known)


def heaviest(weight, keep):
    return sorted(weight.norm(dim=0).argsort(descending=True)[:keep].tolist())


@pytest.mark.parametrize("method", METHODS)
def test_an_expert_that_no_row_reaches_keeps_its_heaviest_units_unrepaired(method):
    pruned = pruned_of(Mixture, data(), method=method, sparsity=0.3)

    down = dense(Mixture)[0].experts[UNSEEN][2]
    kept = list(pruned.plan.kept[f"experts.{UNSEEN}.0.0"])
    assert len(kept) < INNER and kept == heaviest(down.weight, len(kept))
    small = pruned.model.experts[UNSEEN][2]
    assert torch.equal(small.weight, down.weight[:, kept]) and torch.equal(small.bias, down.bias)
    assert all(len(units) < INNER for units in pruned.plan.kept.values())
    assert pruned.report.verify_max_error < 1e-9
    (note,) = [note for note in pruned.report.notes if "no calibration token reaches" in note]
    assert f"reaches experts.{UNSEEN}.2.weight, so" in note and f"module experts.{UNSEEN}" in note
    assert "test_untold.py:" in note and "help: calibrate on more data" in note


@pytest.mark.parametrize("method", METHODS)
def test_units_of_which_only_zeros_are_seen_go_by_their_weights(method):
    pruned = pruned_of(Dead, data(), method=method, sparsity=0.3)

    model, kept = dense(Dead)[0], pruned.plan.kept
    dead = list(kept["dead.0"])
    assert len(dead) < INNER and dead == heaviest(model.down.weight[:, :INNER], len(dead))
    assert len(kept["alive.0"]) < INNER
    assert torch.isfinite(pruned.model.down.weight).all()
    (note,) = [
        note for note in pruned.report.notes if "only zeros reach the columns of dead.0 in" in note
    ]
    assert "down.weight, so that nothing is repaired there" in note and "help: calibrate on" in note


def alone():
    """What `Readers` is without the reader that sees nothing."""
    model = dense(Readers)[0]
    return nn.Sequential(model.up, nn.ReLU(), model.left)


@pytest.mark.parametrize("method", METHODS)
def test_a_reader_that_saw_nothing_has_no_say(method):
    options = {"method": method, "sparsity": 0.3, "restore": "none", "allocation": "uniform"}

    pruned = pruned_of(Readers, data(), **options)

    model = dense(Readers)[0]
    ((name, kept),) = pruned.plan.kept.items()
    (expected,) = pruned_of(alone, data(), **options).plan.kept.values()
    assert len(kept) == len(expected) and set(kept) == set(expected), name
    assert torch.equal(pruned.model.right.weight, model.right.weight[:, list(kept)])
    assert any("token reaches right.weight" in note for note in pruned.report.notes)


@pytest.mark.parametrize("masked", [False, True])
def test_routed_rows_are_cut_into_pieces_of_a_budget_of_memory(masked):
    whole, cut = (
        pruned_of(Mixture, data(), masked, method="fasp", max_memory=most)
        for most in (None, 10_000)
    )

    assert whole.plan == cut.plan and whole.report.notes == cut.report.notes
    for one, other in zip(whole.model.parameters(), cut.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # sums in float32


def test_weights_need_no_data_and_no_note():
    model = Mixture().double().eval()
    pruned = fg.prune(model, data()[0], None, fg.Config(method="magnitude", sparsity=0.3))
    assert not pruned.report.notes


def test_an_interrupted_run_goes_on_with_the_same_notes(tmp_path):
    model, batches = Mixture().double().eval(), data()
    config = fg.Config(method="fasp", sparsity=0.3)

    whole = fg.prune(model, batches[0], batches, config, work=tmp_path)
    resumed = fg.prune(model, batches[0], batches, config, work=tmp_path)

    assert whole.report.notes == resumed.report.notes and whole.plan == resumed.plan
    assert any("no calibration token" in note for note in resumed.report.notes)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_is_refused_wherever_it_comes(method):
    batches = data()
    batches[0][0] = float("nan")
    with pytest.raises(CalibrationError, match="non-finite activations reach .*weight.*help"):
        pruned_of(Mixture, batches, method=method)
