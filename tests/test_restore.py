"""Repaired weights and the errors reported of them are those of the definition, to rounding."""

import pytest
import torch
from torch import nn

import fasp_graph as fg
from passes.drift import Drift
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


@pytest.mark.parametrize(
    ("method", "way"), [("asymmetric", 1), ("residual", 0.5), ("outputs", 0.5)]
)
def test_of_the_way_to_the_dense_path_half_is_gone_or_all(method, way):
    x, w, bias = drawn()
    gap = torch.randn(80, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64) + 1
    moments = Moments(x.T @ x, x.mean(0), len(x))
    drift = Drift(gap.T @ x, gap.mean(0), len(x))

    found = restore(method, w, bias, moments, KEEP, 0.0, drift)

    design = torch.cat([x[:, KEEP], torch.ones(len(x), 1, dtype=x.dtype)], 1)
    exact = torch.linalg.lstsq(design, x @ w.T + bias + way * gap).solution
    torch.testing.assert_close(found.weight[:, KEEP], exact[:-1].T, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.bias, exact[-1], rtol=0, atol=1e-12)


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

    def __init__(self, bend):
        super().__init__()
        self.a, self.b, self.o = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(16, 6)
        self.bend = bend

    def forward(self, x):
        return self.o(torch.cat([self.bend(self.a(x)), self.bend(self.b(x))], -1))


@pytest.mark.parametrize("bend", [nn.ReLU(), nn.Identity()], ids=str)  # linear ones do not turn
def test_a_weight_of_two_groups_is_refitted_without_the_channels_of_both(bend):
    torch.manual_seed(0)
    model, batch = Beside(bend), torch.randn(400, 12) @ torch.randn(12, 12)
    config = fg.Config(0.35, score="rotation", restore="obs", allocation="uniform", ridge=1e-6)
    found = fg.prune(model, batch, [batch], config)
    pruned = found.model
    with torch.no_grad():
        seen = torch.cat([bend(pruned.a(batch)), bend(pruned.b(batch))], -1).double()
        wanted = (model(batch) - model.o.bias).double()
        best = torch.linalg.lstsq(seen, wanted).solution

    assert torch.allclose(pruned.o.weight.double(), best.T, atol=1e-3)
    assert [group.rotated for group in found.report.groups] == [False, False]
