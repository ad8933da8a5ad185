"""Repaired weights and the errors reported of them are those of the definition, to rounding."""

import pytest
import torch
from torch import nn

import fasp_graph as fg
from passes.observe import Moments
from passes.restore import restore

KEEP = torch.tensor([True, False, True, True, False, True, True, False, True])


def drawn():
    """Inputs, weight and bias in float64."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 9, generator=generator, dtype=torch.float64) + 0.7
    w = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    return x, w, torch.randn(4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.01, 0.3])
@pytest.mark.parametrize(("method", "centred"), [("obs", False), ("affine", True)])
def test_the_ridge_is_relative_to_the_mean_of_the_diagonal(method, centred, ridge):
    x, w, bias = drawn()

    found = restore(method, w, bias, Moments(x.T @ x, x.mean(0), len(x)), KEEP, ridge)

    held = x - x.mean(0) if centred else x
    gram = held.T @ held
    inside = gram[KEEP][:, KEEP]
    damped = inside + ridge * inside.diagonal().mean() * torch.eye(len(inside), dtype=x.dtype)
    step = torch.linalg.solve(damped, w[:, ~KEEP] @ gram[~KEEP][:, KEEP], left=False)
    exact = w[:, KEEP] + step
    torch.testing.assert_close(found.weight[:, KEEP], exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.01, 0.3])
def test_fasp_is_the_papers_formula(ridge):
    x, w, bias = drawn()

    found = restore("fasp", w, bias, Moments(x.T @ x, x.mean(0), len(x)), KEEP, ridge)

    kept = x[:, KEEP]
    damping = ridge * (kept.T @ kept).diagonal().mean() * torch.eye(kept.shape[1], dtype=x.dtype)
    exact = w @ x.T @ kept @ torch.linalg.inv(kept.T @ kept + damping)
    torch.testing.assert_close(found.weight[:, KEEP], exact, rtol=0, atol=1e-12)
    assert torch.equal(found.bias, bias)


@pytest.mark.parametrize("method", ["none", "bias", "fasp", "obs", "affine"])
@pytest.mark.parametrize("biased", [True, False])
def test_errors_are_those_of_the_definition(method, biased):
    x, w, bias = drawn()
    bias = bias if biased else None
    found = restore(method, w, bias, Moments(x.T @ x, x.mean(0), len(x)), KEEP, 0.05)
    dense = x @ w.T

    def error(weight, shift):
        return float((dense - x @ weight.T - shift).square().sum() / dense.square().sum())

    moved = found.bias - bias if biased else 0.0
    assert found.error_before == pytest.approx(error(w * KEEP, 0.0), rel=1e-9)
    assert found.error_after == pytest.approx(error(found.weight, moved), rel=1e-9)


class Beside(nn.Module):
    """One weight reads two groups."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 6)

    def forward(self, x):
        return self.o(torch.cat([self.a(x).relu(), self.b(x).relu()], -1))


def test_a_weight_of_two_groups_is_refitted_without_the_channels_of_both():
    torch.manual_seed(0)
    model, batch = Beside(), torch.randn(400, 12) @ torch.randn(12, 12)
    config = fg.Config(0.35, score="obs", restore="obs", allocation="uniform", ridge=1e-6)
    pruned = fg.prune(model, batch, [batch], config).model
    with torch.no_grad():
        seen = torch.cat([pruned.a(batch).relu(), pruned.b(batch).relu()], -1).double()
        wanted = (model(batch) - model.o.bias).double()
        best = torch.linalg.lstsq(seen, wanted).solution

    assert torch.allclose(pruned.o.weight.double(), best.T, atol=1e-3)
