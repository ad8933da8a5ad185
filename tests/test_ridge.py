"""A ridge that is chosen on held-out tokens: its closed form, and what a run says of it."""

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.config import Config
from passes.errors import ConfigError
from passes.observe import Moments, fold
from passes.restore import centres, restore
from passes.ridge import RIDGES, held_out_ridge

KEEP = torch.tensor([True, False, True, True, False, True, True, False, True])


def moments(x):
    return Moments(x.T @ x, x.mean(0), len(x))


def drawn(seed, fit=24, held=80):
    """Inputs to fit to and others, weight and bias in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    x = torch.randn(fit + held, 9, generator=generator, dtype=torch.float64) @ mix + 0.7
    x += torch.randn(x.shape, generator=generator, dtype=torch.float64)
    w = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    return x[:fit], x[fit:], w, torch.randn(4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("method", ["fasp", "obs", "affine"])
def test_it_is_the_ridge_of_least_error_on_the_other_tokens(method, biased):
    taken = set()
    for seed in range(6):
        x, others, w, bias = drawn(seed)
        bias = bias if biased else None

        found = held_out_ridge(method, w, bias, moments(x), moments(others), KEEP)

        def error(ridge, x=x, others=others, w=w, bias=bias):
            new = restore(method, w, bias, moments(x), KEEP, ridge)
            shift = 0 if bias is None else new.bias - bias
            return float((others @ (new.weight - w).T + shift).square().mean())

        assert found == min(RIDGES, key=error)
        taken.add(found)
    assert len(taken) > 1
    assert centres(method, bias) == (biased and method == "affine")


def test_parts_of_the_tokens_add_up():
    x = drawn(0)[0][:22]
    parts = [moments(fold(x, 0, part)) for part in (0, 1)]

    whole = parts[0] + parts[1]

    assert [part.tokens for part in parts] == [17, 5]
    assert torch.equal(fold(x, 0, None), x)
    torch.testing.assert_close(whole.gram, x.T @ x)
    torch.testing.assert_close(whole.mean, x.mean(0))
    assert whole.tokens == 22


def test_of_short_batches_every_fourth_row_is_held_out():
    rows = torch.arange(11)[:, None]
    held = [int(r) for k, row in enumerate(rows) for r in fold(row[None], k, 1)]
    others = [int(r) for k, row in enumerate(rows) for r in fold(row[None], k, 0)]
    assert held == [3, 7]
    assert sorted(held + others) == list(range(11))


class Model(nn.Module):
    """Two MLPs."""

    def __init__(self):
        super().__init__()
        self.ups = nn.ModuleList(nn.Linear(8, 24) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(24, 8) for _ in range(2))

    def forward(self, x):
        for up, down in zip(self.ups, self.downs, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(10, 8, generator=generator) for _ in range(4)]


@pytest.mark.parametrize("method", ["fasp", "slimgpt", "best"])
def test_a_run_says_which_were_taken(method):
    torch.manual_seed(0)
    model, batches = Model().eval(), data()

    pruned = fg.prune(model, batches[0], batches, Config(method=method, ridge="held-out"))

    assert set(pruned.report.ridges) == {"downs.0.weight", "downs.1.weight"}
    assert {r for several in pruned.report.ridges.values() for r in several} <= set(RIDGES)
    low, high = sorted(r for several in pruned.report.ridges.values() for r in several)
    said = f"\nridges by held-out tokens: {low:.0e} to {high:.0e}, in the middle "
    assert said in pruned.report.to_text()
    assert pruned.report.verify_max_error < 1e-5


def test_without_a_repair_there_is_none_to_choose():
    model, batches = Model().eval(), data()
    config = Config(method="wanda", ridge="held-out")
    plain = Config(method="wanda")
    one, other = (fg.prune(model, batches[0], batches, c) for c in (config, plain))
    assert one.plan == other.plan
    assert not one.report.ridges and "ridges" not in one.report.to_text()


def test_one_token_leaves_none_to_hold_out():
    model, batch = Model().eval(), torch.randn(1, 8)
    config = Config(method="fasp", ridge="held-out", sparsity=0.2)
    pruned = fg.prune(model, batch, [batch], config)
    plain = fg.prune(model, batch, [batch], Config(method="fasp", sparsity=0.2))
    for new, old in zip(pruned.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(new, old)


def test_anything_else_is_refused():
    with pytest.raises(ConfigError, match="ridge='auto' is unknown · help: one of held-out or a"):
        Config(ridge="auto")
    with pytest.raises(ConfigError, match="ridge=-1.0 is too small"):
        Config(ridge=-1.0)
