"""Bad input: each is refused by an error that says what, or is pruned exactly; the model that was
given is never changed.
"""

import copy
import socket
import warnings
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.utils import parametrizations, parametrize

import fasp_graph as fg
from fasp_graph.calibration import alike
from passes.compare import tensors

X = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))


def mlp(*middle):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 8), *(middle or (nn.ReLU(),)), nn.Linear(8, 5)).eval()


def changed(name, change):
    model = mlp()
    with torch.no_grad():
        change(dict(model.named_parameters())[name])
    return model


class Calls(nn.Module):
    """A module whose forward is a function of it and x."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.spare = nn.Linear(7, 8), nn.Linear(8, 7), nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))
        self.call = forward

    def forward(self, x):
        return self.call(self, x)


@dataclass
class Answer:
    """What a user's forward may return."""

    logits: torch.Tensor
    name: str = "mlp"


def branches(m, x):
    return m.b(m.a(x)) if x.sum() > 0 else m.b(m.a(-x))


def whole(m, x):
    return m.b(torch.relu(m.a(x)))


def counts(m, x):
    m.count.add_(1)
    return whole(m, x) + m.count


def writes_into_its_input(m, x):
    x.mul_(2)
    return whole(m, x)


class Scaled(nn.Module):
    """A module that also takes a number."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, by):
        return self.inner(x) * by


class Differs(nn.Module):
    """A module of two inputs of one shape."""

    def __init__(self):
        super().__init__()
        self.inner = mlp()

    def forward(self, x, y):
        return self.inner(x - 2 * y)


def hooked(change):
    """A user's hook, that looks on or that changes what the layer gives."""
    model, seen = mlp(), []
    model[0].register_forward_hook(
        lambda module, args, out: out * 2 if change else seen.append(out.shape)
    )
    return model


def laid_out(change):
    """The first weight in another layout of memory."""
    model = mlp()
    model[0].weight = nn.Parameter(change(model[0].weight.detach()))
    return model


class Doubled(nn.Module):
    """A user's parametrisation."""

    def forward(self, weight):
        return weight * 2


def parametrised():
    model = mlp(nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    parametrize.register_parametrization(model[2], "weight", Doubled())
    return model


def sharded(wrap):
    """A model as torch.distributed shards it, over one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        return run(wrap(mlp()))
    finally:
        dist.destroy_process_group()


def flattened(model):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"))


def on_two_devices():
    """The second layer lies on a device that this machine need not have."""
    away = nn.Linear(5, 2, bias=False)
    fake = FakeTensor(FakeTensorMode(), torch.empty(2, 5, device="meta"), torch.device("cuda:0"))
    away.weight = nn.Parameter(fake)
    return fg.analyze(nn.Sequential(mlp(), away), X)


def quantised():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(mlp(), {nn.Linear})


def with_parameter(parameter):
    model = mlp()
    model.extra = nn.Parameter(parameter, requires_grad=False)
    return model


def normed(norm):
    return mlp(nn.ReLU(), norm(nn.Linear(8, 8)), nn.ReLU())


def run(model, inputs=X, calibration=(X,), **options):
    return fg.prune(model, inputs, calibration, fg.Config(**{"sparsity": 0.3, **options}))


REFUSED = {
    "empty calibration": (lambda: run(mlp(), calibration=[]), "calibration is empty"),
    "no calibration": (lambda: run(mlp(), calibration=None), "calibration"),
    "calibration of another width": (lambda: run(mlp(), calibration=[X[:, :3]]), "does not run"),
    "integers for floats": (lambda: run(mlp(), calibration=[X.long()]), "does not run"),
    "calibration is a number": (lambda: run(mlp(), calibration=3), "calibration"),
    "batch is a word": (lambda: run(mlp(), calibration=["words"]), "does not run"),
    "NaN in calibration": (lambda: run(mlp(), calibration=[X / 0 * 0]), "finite"),
    "rows of no tokens": (lambda: run(mlp(), calibration=[X[:0]]), "every .* batch is empty"),
    "no tokens without sensing": (
        lambda: run(mlp(), calibration=[X[:0], X[:0]], method="fasp"),
        "every calibration batch is empty · help: give batches with at least one row",
    ),
    "inputs without a row": (lambda: run(mlp(), inputs=X[:0]), "gives no numbers at these inputs"),
    "other names": (lambda: run(mlp(), calibration=[{"y": X}]), r"batch 0 is \{'y': 'float32"),
    "another constant": (
        lambda: run(Scaled(), (X, 2), [(X, 2), (X, 3)]),
        r"batch 1 is \('float32 \[6, 7\]', 3\), but .* \('float32 \[6, 7\]', 2\)",
    ),
    "activations that overflow": (
        lambda: run(changed("0.weight", lambda w: w.mul_(1e38))),
        "non-finite activations reach 2.weight",
    ),
    "NaN in a weight": (
        lambda: run(changed("0.weight", lambda w: w.fill_(float("nan")))),
        "non-finite activations reach 2.weight",
    ),
    "NaN in a weight, without data": (
        lambda: run(changed("2.weight", lambda w: w[1].fill_(float("nan"))), method="magnitude"),
        "the dense model itself gives NaN, first at 2.weight",
    ),
    "infinite weight": (
        lambda: run(changed("0.weight", lambda w: w[0].fill_(float("inf")))),
        "non-finite activations reach 2.weight",
    ),
    "a model's name": (lambda: run("gpt2"), "model is 'gpt2', not a torch.nn.Module"),
    "a model's class": (lambda: run(nn.Linear), "not a torch.nn.Module"),
    "weight_norm by hooks": (
        lambda: run(normed(torch.nn.utils.weight_norm)),
        "torch.nn.utils.weight_norm",
    ),
    "spectral_norm by hooks": (
        lambda: run(normed(torch.nn.utils.spectral_norm)),
        "no group can be pruned",
    ),
    "no inputs": (lambda: run(mlp(), inputs=()), "no tensor"),
    "inputs of another width": (lambda: run(mlp(), inputs=X[:, :2]), "cannot capture"),
    "sparsity 0": (lambda: run(mlp(), sparsity=0.0), "sparsity"),
    "sparsity above 1": (lambda: run(mlp(), sparsity=1.5), "sparsity"),
    "sparsity NaN": (lambda: run(mlp(), sparsity=float("nan")), "sparsity"),
    "impossible sparsity": (lambda: run(mlp(), sparsity=0.999), "0.834 is the largest"),
    "nothing to prune": (lambda: run(nn.Linear(7, 5)), "no group can be pruned"),
    "groups of one unit": (
        lambda: run(nn.Sequential(nn.Linear(7, 1), nn.ReLU(), nn.Linear(1, 5))),
        "no group can be pruned",
    ),
    "data-dependent branch": (lambda: run(Calls(branches)), "one way of a branch"),
    "integer parameter": (lambda: run(with_parameter(torch.zeros(2).int())), "is int32"),
    "lazy layer": (lambda: run(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 5))), "lazy"),
    "spectral_norm": (lambda: run(normed(parametrizations.spectral_norm)), "no group can be"),
    "a DTensor": (lambda: sharded(lambda m: fully_shard(m)), "DTensor"),
    "flattened by FSDP": (lambda: sharded(flattened), "wrapped by FSDP"),
    "two devices": (on_two_devices, "spread over cpu, cuda"),
    "an input that is written to": (lambda: run(Calls(writes_into_its_input)), "writes into its"),
    "quantised layers": (lambda: run(quantised()), "is qint8: quantised weights cannot be cut"),
    "the meta device": (
        lambda: run(nn.Sequential(mlp(), nn.Linear(5, 2, device="meta"))),
        "without numbers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_with_a_reason(name):
    call, message = REFUSED[name]

    with pytest.raises(fg.FaspGraphError, match=message) as caught:
        call()

    assert len(str(caught.value)) > 20


TAKEN = {
    "train mode": lambda: mlp().train(),
    "dropout": lambda: mlp(nn.ReLU(), nn.Dropout(0.5)).train(),
    "a dead channel": lambda: changed("0.weight", lambda w: w[3].zero_()),
    "a constant channel": lambda: mlp(nn.Sigmoid(), nn.Threshold(0.5, 1.0)),
    "equal channels": lambda: changed("0.weight", lambda w: w.copy_(w[:1].expand_as(w))),
    "unused parameters": lambda: Calls(whole),
    "a layer called twice": lambda: Calls(lambda m, x: m.b(m.a(torch.relu(m.b(m.a(x)))))),
    "a weight used turned": lambda: Calls(lambda m, x: nn.functional.linear(m.a(x), m.a.weight.T)),
    "a dataclass": lambda: Calls(lambda m, x: Answer(whole(m, x))),
    "a hook that looks on": lambda: hooked(False),
    "a hook that changes numbers": lambda: hooked(True),
    "a buffer that counts": lambda: Calls(counts),
    "a weight that is no row-major block": lambda: laid_out(lambda w: w.T.contiguous().T),
    "a weight that is expanded": lambda: laid_out(lambda w: w[:, :1].expand_as(w)),
    "a weight that is a window": lambda: laid_out(lambda w: torch.cat([w, w], 1)[:, 2:9]),
    "a parametrisation": parametrised,
    "weight_norm": lambda: normed(parametrizations.weight_norm),
    "nested dicts": lambda: Calls(lambda m, x: {"a": {"b": [whole(m, x)]}}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_unusual_models_are_pruned_exactly_and_stay_as_they_are(name):
    model = TAKEN[name]()
    before, training = copy.deepcopy(model.state_dict()), model.training

    result = run(model)

    assert result.report.params_after < result.report.params_before
    assert model.training is training
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(bool(t.isfinite().all()) for t in tensors(result.graph_module(X)))


@pytest.mark.parametrize("method", ["best", "fasp", "slimgpt"])
def test_fewer_tokens_than_channels_lean_on_the_ridge_and_say_so(method):
    result = run(mlp(), calibration=[X[:2], X[2:4]], method=method)

    assert result.report.verify_max_error <= 1e-9
    assert all(bool(weight.isfinite().all()) for weight in result.model.parameters())
    (note,) = result.report.notes
    assert "4 calibration samples for the 8 channels that enter 2.weight" in note
    assert "help: calibrate on at least 8 samples" in note
    assert result.report.to_dict()["notes"] == [note]


def test_enough_tokens_or_no_solve_say_nothing():
    enough = run(mlp(), calibration=[torch.cat([X, X[:2]])]).report
    assert not [note for note in enough.notes if "few" in note]
    assert run(mlp(), calibration=[X[:2]], method="flap").report.notes == ()


def test_the_order_of_a_batch_is_of_no_matter():
    """A graph binds by position; names decide, in nested dicts too."""
    pair = {"x": X, "y": X.flip(0)}
    turned = {"y": X.flip(0), "x": X}
    expected = run(Differs(), pair, [pair], method="fasp").model.state_dict()

    found = run(Differs(), pair, [turned], method="fasp").model.state_dict()

    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    batch, like = ((), {"outer": [turned, True]}), ((), {"outer": [pair, True]})
    assert list(alike(batch, like, 0)[1]["outer"][0]) == ["x", "y"]


def test_the_same_seed_gives_the_same_bytes():
    first, again = run(mlp()).graph_module.state_dict(), run(mlp()).graph_module.state_dict()

    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
