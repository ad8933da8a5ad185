"""The errors that `restore` reports are those of the definition, for every kind of repair."""

import pytest
import torch

from passes.observe import Moments
from passes.restore import restore


@pytest.mark.parametrize("method", ["none", "bias", "fasp", "affine"])
@pytest.mark.parametrize("biased", [True, False])
def test_errors_are_those_of_the_definition(method, biased):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(80, 9, generator=generator, dtype=torch.float64) + 0.7
    w = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64) if biased else None
    keep = torch.tensor([True, False, True, True, False, True, True, False, True])
    found = restore(method, w, bias, Moments(x.T @ x, x.mean(0), len(x)), keep, 0.05)
    dense = x @ w.T

    def error(weight, shift):
        return float((dense - x @ weight.T - shift).square().sum() / dense.square().sum())

    moved = found.bias - bias if biased else 0.0
    assert found.error_before == pytest.approx(error(w * keep, 0.0), rel=1e-9)
    assert found.error_after == pytest.approx(error(found.weight, moved), rel=1e-9)
