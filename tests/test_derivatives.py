"""Complex weights stay and what is beside them goes; a model without a gradient is pruned by what
each layer's error is, and says so.
"""

import copy

import pytest
import torch
from torch import nn

import fasp_graph as fg
from passes.errors import CalibrationError


@torch.library.custom_op("derivatives::swish", mutates_args=())
def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


@swish.register_fake
def _(x):
    return torch.empty_like(x)


class Fourier(nn.Module):
    """A Fourier layer between two multi-layer perceptrons over the channels."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift = nn.Sequential(nn.Conv1d(1, 12, 1), nn.GELU(), nn.Conv1d(12, 6, 1))
        self.mixed = nn.Parameter(torch.randn(6, 6, 3, dtype=torch.complex64) / 6)
        self.lower = nn.Sequential(nn.Conv1d(6, 10, 1), nn.GELU(), nn.Conv1d(10, 1, 1))

    def forward(self, x):
        waves = torch.fft.rfft(self.lift(x))
        low = torch.einsum("bix,iox->box", waves[..., :3], self.mixed)
        waves = torch.cat([low, waves[..., 3:]], -1)
        return self.lower(torch.fft.irfft(waves, n=x.shape[-1])), waves


def drawn(*shape, count=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*shape, generator=generator) for _ in range(count)]


def test_complex_weights_stay_and_the_channels_beside_them_go(tmp_path):
    model, (x, *calibration) = Fourier().eval(), drawn(5, 1, 16)

    pruned = fg.prune(model, x, calibration, fg.Config(sparsity=0.2, check=True))

    assert set(pruned.plan.kept) == {"lift.0.0", "lower.0.0"}
    frozen = next(g for g in pruned.deps.groups if ("mixed", 1) in _members(g))
    told = pruned.deps.explain("mixed")
    assert "the complex weight mixed · node %einsum" in frozen.reason and frozen.reason in told
    assert "test_derivatives.py" in frozen.reason and "join them by torch.complex" in told
    assert pruned.model.mixed.dtype == torch.complex64
    fg.save(pruned, tmp_path / "out")
    loaded = fg.load(tmp_path / "out", model=Fourier())
    for ours, theirs in zip(loaded(x), pruned.model(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def _members(group):
    return {(member.parameter, member.dim) for member in group.members}


class Behind(nn.Module):
    """A chain before an op that has no derivative, and one after it."""

    def __init__(self, between):
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)
        self.c, self.d = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.d(torch.relu(self.c(self.between(self.b(torch.relu(self.a(x)))))))


def unformulated(x):
    return swish(x)


def nearest(x):
    """Vector quantisation: the code nearest to x."""
    codes = torch.linspace(-1, 1, 40).reshape(5, 8)
    return codes[(x @ codes.T).argmax(-1)]


@pytest.mark.parametrize(
    ("between", "word", "restore"),
    [
        (unformulated, "no autograd formula", "affine"),
        (nearest, "no gradient of the outputs reaches b.weight", None),
    ],
)
def test_without_a_gradient_errors_are_compared_layer_by_layer(between, word, restore):
    x, *calibration = drawn(40, 8, count=21)

    pruned = fg.prune(Behind(between).eval(), x, calibration, fg.Config(sparsity=0.3))

    assert any(word in note for note in pruned.report.notes), pruned.report.notes
    same = fg.Config(sparsity=0.3, allocation="curves", restore=restore)
    plain = fg.prune(Behind(between).eval(), x, calibration, same)
    assert pruned.plan.kept == plain.plan.kept


@pytest.mark.parametrize("asked", [{"allocation": "sensitivity"}, {"restore": "outputs"}])
def test_a_step_that_needs_a_gradient_is_refused_by_name(asked):
    x, *calibration = drawn(40, 8, count=21)
    model = Behind(unformulated).eval()
    before = copy.deepcopy(model.state_dict())

    with pytest.raises(CalibrationError, match="no derivative.*swish.*help.*register_autograd"):
        fg.prune(model, x, calibration, fg.Config(**asked))

    assert all(torch.equal(before[key], held) for key, held in model.state_dict().items())


def test_prune_takes_its_gradients_where_the_caller_has_switched_them_off():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(32, 8, generator=draw) for _ in range(4)]
    plain = fg.prune(model, batches[0], batches, fg.Config())
    with torch.no_grad():
        within = fg.prune(model, batches[0], batches, fg.Config())

    assert within.plan == plain.plan and within.report.notes == plain.report.notes
    assert within.report.distances == plain.report.distances
