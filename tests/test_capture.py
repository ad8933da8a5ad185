"""capture: the graph computes what the model does, at two sizes; what it refuses, it names."""

import itertools
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from passes.capture import capture
from passes.clean import op_name
from passes.compare import tensors
from passes.errors import CaptureError
from passes.functional import is_inplace
from passes.skeleton import has_numbers, skeleton


def ops(captured):
    return [op_name(n) for n in captured.graph_module.graph.nodes if n.op == "call_function"]


def assert_same(model, captured, *inputs):
    with torch.no_grad():
        expected, actual = model.eval()(*inputs), captured.graph_module(*inputs)

    for left, right in zip(tensors(expected), tensors(actual), strict=True):
        assert torch.equal(left, right)


class Written(nn.Module):
    """In-place ops: on temporaries, through a slice, and through a view that is read later."""

    def __init__(self, case):
        super().__init__()
        self.linear, self.case = nn.Linear(6, 6), case

    def forward(self, x):
        return getattr(self, self.case)(self.linear(x))

    def temporary(self, y):
        y.add_(1.0).mul_(2.0)
        return y.relu_().clamp_(max=3.0)

    def masked(self, y):
        y.masked_fill_(y > 0.5, -1.0)
        return y

    def through_a_slice(self, y):
        out = torch.zeros_like(y) * 1.0
        out[:, 2:] = y[:, 2:]
        out[:, 0].fill_(5.0)
        return out + y

    def seen_by_a_view(self, y):
        rows = y.view(-1, 3)
        y.mul_(3.0)
        return rows + 1


@pytest.mark.parametrize("case", ["temporary", "masked", "through_a_slice"])
def test_writes_to_temporaries_become_functional(case):
    torch.manual_seed(0)
    model, x = Written(case), torch.randn(3, 6)

    captured = capture(model, x)

    assert not any(is_inplace(node) for node in captured.graph_module.graph.nodes)
    assert_same(model, captured, x)


def test_a_write_that_a_view_sees_stays_in_place():
    torch.manual_seed(0)
    model, x = Written("seen_by_a_view"), torch.randn(3, 6)

    captured = capture(model, x)

    assert [op_name(n) for n in captured.graph_module.graph.nodes if is_inplace(n)] == ["mul_"]
    assert_same(model, captured, x)


class Noise(nn.Module):
    """Everything that is to be cleaned away, in nested wrappers."""

    def __init__(self):
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 4), nn.Dropout(0.5)

    def forward(self, x):
        with torch.no_grad():
            scale = torch.arange(6).to(x.dtype)
            with torch.autocast("cpu", enabled=False):
                y = self.linear((x * scale).detach().to(torch.float32).contiguous())
        return self.drop(y[:, :].view(-1, 2, 2))


def test_no_ops_and_wrappers_are_gone():
    torch.manual_seed(0)
    model, x = Noise(), torch.randn(3, 6)

    captured = capture(model, x)

    assert not set(ops(captured)) & {"detach", "contiguous", "dropout", "view", "slice", "alias"}
    assert not any("wrap" in str(n.target) for n in captured.graph_module.graph.nodes)
    assert "reshape" in ops(captured)
    assert_same(model, captured, x)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).view(x.shape[0], x.shape[1], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(x.shape))


def test_attention_is_contiguous_before_its_reshape_and_any_batch_runs():
    torch.manual_seed(0)
    model = Attention()

    captured = capture(model, torch.randn(3, 5, 8))

    at = ops(captured).index("scaled_dot_product_attention")
    assert ops(captured)[at + 1 : at + 4] == ["transpose", "clone", "reshape"]
    assert_same(model, captured, torch.randn(7, 5, 8))


@dataclass
class Result:
    logits: torch.Tensor
    extra: dict


class Structured(nn.Module):
    """An unregistered dataclass that holds a dict, and an option that only some callers pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x, use_cache=True):
        y = self.linear(x)
        return Result(y, {"half": y / 2, "cache": object() if use_cache else None})


def test_dataclasses_and_nested_dicts_come_out_as_plain_structures():
    torch.manual_seed(0)
    model, x = Structured(), torch.randn(3, 6)

    captured = capture(model, {"x": x})

    out = captured.graph_module(x=x)
    assert set(out) == {"logits", "extra"} and out["extra"]["cache"] is None
    assert torch.equal(out["logits"], model(x).logits)


def test_the_model_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout())
    before = {name: value.clone() for name, value in model.state_dict().items()}

    capture(model, torch.randn(4, 6))

    assert model.training and "forward" not in vars(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, width), nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.full((width,), 2.0))

    def forward(self, ids):
        return self.head(self.embed(ids) * self.scale)


def test_a_skeleton_has_the_graph_of_the_real_model():
    ids = torch.randint(0, 11, (3, 5))
    bare = skeleton(lambda: Tied(2**12))

    real, captured = capture(Tied(), ids, dynamic=False), capture(bare, ids)

    assert not has_numbers(bare) and captured.dynamic_shapes is None and not captured.compared
    assert ops(real) == ops(captured)
    module = captured.graph_module
    assert module.embed.weight is module.head.weight and module.embed.weight.shape == (11, 2**12)
    assert torch.equal(module.scale, torch.full((2**12,), 2.0))


def test_tokens_are_dynamic_in_both_axes():
    torch.manual_seed(0)
    model = Tied()

    captured = capture(model, {"ids": torch.randint(0, 11, (3, 5))})

    ids = torch.randint(0, 11, (2, 9))
    assert torch.equal(captured.graph_module(ids=ids), model(ids))


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = self.linear(x)
        return y if y.sum() > 0 else -y


def test_data_dependent_control_flow_is_named_with_its_line(capfd):
    with pytest.raises(CaptureError, match=r"data-dependent .*test_capture\.py:\d+ in forward"):
        capture(Branches(), torch.randn(3, 6))

    assert "def forward" not in "".join(capfd.readouterr())


class Sloppy(nn.Module):
    """Counts its calls outside of torch: no two of them compute the same."""

    calls = itertools.count(1)

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return self.linear(x) * next(self.calls)


def test_other_numbers_than_the_model_are_refused():
    with pytest.raises(CaptureError, match="other numbers"):
        capture(Sloppy(), torch.randn(3, 6))


class Careful(nn.Module):
    """Casts a part of itself to what it is; its stride is a number in a buffer."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.register_buffer("stride", torch.tensor(2))

    def forward(self, x):
        self.linear = self.linear.to(x.dtype)
        missing = int(-x.shape[-1] % self.stride)
        return nn.functional.avg_pool1d(nn.functional.pad(self.linear(x), (0, missing)), 2)


def test_casts_without_effect_and_numbers_in_buffers_are_no_obstacle():
    model = Careful().eval()

    captured = capture(model, torch.randn(4, 3, 6))

    x = torch.randn(4, 3, 6)
    assert torch.equal(captured.graph_module(x), model(x))
    assert model.stride.item() == 2 and nn.Module.to.__module__ == "torch.nn.modules.module"


def quantised():
    model = nn.Sequential(nn.Linear(6, 6))
    model[0].weight = nn.Parameter(torch.zeros(6, 6, dtype=torch.int8), requires_grad=False)
    return model


def buffer_on_meta():
    model = nn.BatchNorm1d(6)
    model.running_mean = model.running_mean.to("meta")
    return model


@pytest.mark.parametrize(
    ("build", "word"),
    [
        (quantised, "quantised"),
        (lambda: nn.LazyLinear(6), "lazy"),
        (buffer_on_meta, "meta device"),
    ],
)
def test_what_cannot_be_captured_is_said_in_a_word(build, word):
    with pytest.raises(CaptureError, match=f"{word}.*help"):
        capture(build(), torch.randn(3, 6))


def test_inputs_without_a_tensor_are_refused(mlp):
    with pytest.raises(CaptureError, match="hold no tensor"):
        capture(mlp, {"x": 3})
