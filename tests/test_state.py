"""A model that remembers: what it remembers is the user's, whatever the compiler ran."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fasp_graph
from fasp_graph import Config
from fasp_graph.evaluate import flops
from fasp_graph.measures import accuracy, embeddings
from passes.capture import capture
from passes.errors import CaptureError
from passes.state import steady


class Counting(nn.Module):
    """Counts its calls and follows the mean of its inputs and of its hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 20), nn.Linear(20, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("level", torch.rand(20))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.lerp_(x.mean(0), 0.1)
        hidden = torch.relu(self.up(x - self.mean))
        self.level.mul_(0.9).add_(0.1 * hidden.detach().mean(0))
        return self.down(hidden / (1 + self.level))


def counting() -> Counting:
    torch.manual_seed(0)
    model = Counting().double().eval()
    model(torch.randn(5, 6).double())
    return model


def pruned_counting(model: Counting, **options: Any) -> fasp_graph.Pruned:
    data = [torch.randn(30, 6).double() for _ in range(3)]
    return fasp_graph.prune(model, data[0][:4], data, Config(sparsity=0.4, **options))


@pytest.mark.parametrize("method", ["best", "fasp", "magnitude"])
def test_the_result_stands_where_the_model_stood(method: str) -> None:
    model = counting()
    pruned = pruned_counting(model, method=method)
    kept = pruned.plan.kept["up.0"]
    assert pruned.emission.ways == {"up.0": "native"}
    for held in (model, pruned.model, pruned.graph_module):
        state = dict(held.named_buffers())
        assert state["calls"] == 1
        torch.testing.assert_close(state["mean"], model.mean, rtol=0, atol=0)
        units = range(20) if held is model else kept
        torch.testing.assert_close(state["level"], model.level[list(units)], rtol=0, atol=0)


def test_the_result_goes_on_to_remember() -> None:
    pruned = pruned_counting(counting(), method="fasp")
    for _ in range(3):
        x = torch.randn(5, 6).double()
        torch.testing.assert_close(pruned.model(x), pruned.graph_module(x))
    assert pruned.model.calls == pruned.graph_module.calls == 4


def test_an_export_leaves_the_result_as_it_is(tmp_path: Path) -> None:
    pruned = pruned_counting(counting(), method="fasp")
    fasp_graph.save(pruned, tmp_path / "folder")
    fasp_graph.export(pruned, tmp_path / "model.pt2", format="pt2")
    assert pruned.model.calls == pruned.graph_module.calls == 1


def test_measures_leave_a_model_as_it_is() -> None:
    model = counting()
    batches = [(torch.randn(4, 6).double(), torch.zeros(4, dtype=torch.int64))]
    accuracy(model, batches)
    embeddings(model, [batches[0][0]])
    flops(model, (batches[0][0],))
    assert model.calls == 1


class Cache(nn.Module):
    """Adds up what it was given in the last calls, each in a slot of its own."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.out = nn.Linear(8, 24), nn.Linear(24, 12), nn.Linear(12, 3)
        self.register_buffer("slots", torch.zeros(6, 12))
        self.register_buffer("at", torch.zeros((), dtype=torch.int64))
        self.counts, self.calls = counts, 0

    def forward(self, x: Tensor) -> Tensor:
        h = self.down(torch.relu(self.up(x)))
        at = torch.tensor([self.calls % 6]) if self.counts else (self.at % 6)[None]
        self.slots.index_copy_(0, at, h.mean(0, keepdim=True))
        self.at += 1
        self.calls += 1
        return self.out(h + self.slots.sum(0))


def test_slots_that_forward_writes_stay() -> None:
    model = Cache(counts=False).double().eval()
    data = torch.randn(4, 8).double()
    config = Config(sparsity=0.4, method="magnitude", kinds=("chain", "bilinear"))
    pruned = fasp_graph.prune(model, data, None, config)
    assert pruned.model.slots.shape[0] == 6 and pruned.model.up.out_features < 24
    for call in range(9):  # around the ring
        x = torch.randn(3, 8, generator=torch.Generator().manual_seed(call)).double()
        torch.testing.assert_close(pruned.model(x), pruned.graph_module(x))


def test_what_a_graph_cannot_remember_is_refused() -> None:
    with pytest.raises(CaptureError, match="when it is called again .* remembers"):
        capture(Cache(counts=True).double().eval(), torch.randn(4, 8).double())


def test_attributes_buffers_and_tensors_come_back() -> None:
    class Noting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(2))
            self.plain, self.number, self.items = torch.zeros(2), 0, [1]

        def forward(self, x: Tensor) -> Tensor:
            self.number += 1
            self.items.append(x)
            self.plain.add_(x)
            self.seen = self.seen + x
            self.last = x
            return x

    module = Noting()
    with steady(module):
        module(torch.ones(2))
        assert module.number == 1 and module.last.sum() == 2
    assert module.number == 0 and module.items == [1] and not hasattr(module, "last")
    assert module.plain.sum() == module.seen.sum() == 0
