"""Half precision: comparisons are made where its rounding does not hide what they look for."""

import copy

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.emit import cases
from passes import capture, compare, verify
from passes.errors import VerificationError
from passes.lazy import is_lazy
from passes.precision import is_half, widened


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))).to(x.dtype))


def deep(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(24) for _ in range(12)), nn.Linear(24, 5)).to(dtype).eval()


def test_a_widened_copy_computes_as_float32_weights_would():
    half = deep()
    x = torch.randn(4, 24)
    wide, exact = widened(half), copy.deepcopy(half).float()
    assert is_half(half) and is_lazy(wide) and not is_half(wide)
    torch.testing.assert_close(wide(x), exact(x), rtol=0, atol=0)
    assert all(p.dtype == torch.bfloat16 for p in half.parameters())


def test_a_model_too_large_for_float64_is_verified_in_float32(monkeypatch):
    monkeypatch.setattr(verify, "FLOAT64_LIMIT", 0)
    x = torch.randn(4, 24).bfloat16()
    pruned = fg.prune(deep(), x, [x] * 8, fg.Config(method="fasp", sparsity=0.4))
    assert pruned.report.verify_max_error < 1e-5  # bfloat16 itself rounds to 4e-3
    assert pruned.model(x).dtype == torch.bfloat16


def test_a_wrong_graph_in_half_precision_is_found(monkeypatch):
    monkeypatch.setattr(verify, "FLOAT64_LIMIT", 0)
    rewrite = fg.prune.__globals__["rewrite"]

    def wrong(dense, cut):
        compact = rewrite(dense, cut)
        with torch.no_grad():
            next(p for n, p in compact.named_parameters() if n.endswith("0.down.weight"))[0] *= 1.02
        return compact

    monkeypatch.setitem(fg.prune.__globals__, "rewrite", wrong)
    x = torch.randn(4, 24).bfloat16()
    with pytest.raises(VerificationError, match=r"differ by .* \(allowed 1e-04\)"):
        fg.prune(deep(), x, [x] * 8, fg.Config(method="fasp", sparsity=0.4))


def test_rounding_alone_refuses_neither_a_capture_nor_a_class():
    """As if the model were so deep that its rounding exceeded what is allowed."""

    class Rough(Block):
        def forward(self, x):
            y = super().forward(x)
            traced = torch.compiler.is_compiling()
            return y if traced or x.dtype != torch.bfloat16 else y * (1 + 2**-7)

    model = deep()
    for place in range(12):
        rough = Rough(24).bfloat16().eval()
        rough.load_state_dict(model[place].state_dict())
        model[place] = rough
    x = torch.randn(4, 24).bfloat16()
    captured = capture.capture(model, x).graph_module
    expected = model(x).float()
    assert float((captured(x) - expected).abs().max() / expected.abs().max()) > compare.HALF
    pruned = fg.prune(model, x, [x] * 8, fg.Config(method="fasp", sparsity=0.4))
    assert set(pruned.emission.ways.values()) == {"native"}


def test_what_rounding_explains_is_one_part_in_a_hundred_thousand():
    model, x = nn.Linear(3, 2), torch.ones(4, 3)
    with torch.no_grad():
        right = model(x)
    args = ((x,), {})
    assert cases.apart(model, args, [right]) == 0.0
    assert cases.apart(model, args, [right * (1 + 2e-6)]) < 1
    assert cases.apart(model, args, [right * (1 + 2e-5)]) > 1
    assert cases.apart(model, args, [right[:1]]) == float("inf")
    assert cases.apart(model, args, [right * float("nan")]) == float("inf")
    half = model.bfloat16()
    with torch.no_grad():
        right = half(x.bfloat16())
    assert cases.apart(half, ((x.bfloat16(),), {}), [right * 1.01]) < 1
    assert cases.apart(half, ((x.bfloat16(),), {}), [right * 1.1]) > 1
