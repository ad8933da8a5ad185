"""Spilled activations give the same plan and weights; memory within the budget."""

import pytest
import torch
from torch import nn

import passes.observe
from fasp_graph import Config, prune
from fasp_graph.scale.microbatch import microbatches, working_set
from fasp_graph.scale.spill import Spill
from passes.capture import capture


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.ReLU()).eval()


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(128, 64, generator=generator) for _ in range(4)]


def test_spilling_changes_nothing(monkeypatch):
    move = Spill._write
    config, data = {"sparsity": 0.4, "method": "fasp"}, batches() * 2
    whole = prune(model(), data[0], data, Config(**config))
    written = []
    monkeypatch.setattr(Spill, "_write", lambda self, at: (written.append(at), move(self, at)))
    spilled = prune(model(), data[0], data, Config(**config, max_memory=600_000))
    assert written
    assert whole.plan == spilled.plan
    for left, right in zip(whole.model.parameters(), spilled.model.parameters(), strict=True):
        assert torch.equal(left, right)


def test_batches_are_cut_to_the_budget():
    captured = capture(model(), batches()[0])
    assert working_set(captured.graph_module, ((batches()[0],), {})) == 2 * 128 * 256 * 4
    given = [((batch,), {}) for batch in batches()]
    cut = microbatches(captured, given, 2 * 256 * 4 * 2 * 40)  # 40 rows of GELU's in- and output
    assert [len(args[0]) for args, _ in cut] == [32] * 16
    assert torch.equal(torch.cat([args[0] for args, _ in cut]), torch.cat(batches()))
    config = {"sparsity": 0.4, "method": "fasp"}
    whole = prune(model(), batches()[0], batches(), Config(**config))
    pieces = prune(model(), batches()[0], batches(), Config(**config, max_memory=200_000))
    assert whole.plan == pieces.plan
    for left, right in zip(whole.model.parameters(), pieces.model.parameters(), strict=True):
        assert torch.allclose(left, right, rtol=0, atol=1e-5)


def test_rows_that_meet_are_not_parted():
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    captured = capture(Centred().eval(), batches()[0])
    given = [((batches()[0],), {})]
    assert microbatches(captured, given, 1) == given


def test_live_values_stay_within_the_budget(tmp_path):
    node = torch.fx.Graph().call_function(torch.relu)
    other = torch.fx.Graph().call_function(torch.relu)
    value = torch.randn(100, 400)
    environments = [{node: value, other: value[10:20].T} for _ in range(1)]
    spill = Spill(100_000, tmp_path)
    spill(environments)
    moved = environments[0]
    assert spill.written == value.untyped_storage().nbytes()
    assert torch.equal(moved[node], value) and torch.equal(moved[other], value[10:20].T)
    assert moved[node].untyped_storage().data_ptr() == moved[other].untyped_storage().data_ptr()
    assert moved[node].untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    spill(environments)
    assert spill.written == value.untyped_storage().nbytes()
    assert not list(tmp_path.iterdir())


def test_values_of_any_kind_come_back_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setattr("fasp_graph.scale.spill.SMALLEST", 1)
    graph = torch.fx.Graph()
    pairs = torch.randn(6, 4, 2, dtype=torch.double)
    whole = torch.view_as_complex(pairs)
    whole, other = torch.view_as_complex(pairs), torch.randn(4, dtype=torch.complex64)
    odd = torch.arange(11, dtype=torch.uint8)
    values = [
        *(pairs, whole, whole[1:], pairs[2:, :, 1].T),
        *(other, other.conj()),
        *(torch.arange(7) > 3, torch.tensor(2.5), torch.zeros(0, 3)),
        torch.randn(3, 1).expand(3, 9),
        *(odd, odd[:8].view(torch.int32)),
        *(torch.randn(9, dtype=torch.bfloat16)[1:], torch.arange(5).view(torch.int32)[1:]),
    ]
    environment = {graph.call_function(torch.relu): value for value in values}
    before = [value.clone() for value in values]
    spill = Spill(0, tmp_path)
    spill([environment])
    assert spill.written == 6 * 4 * 2 * 8 + 7 + 4 + 3 * 4 + 11 + 9 * 2 + 5 * 8
    for old, value, new in zip(before, values, environment.values(), strict=True):
        assert torch.equal(old, new) and new.stride() == value.stride()


@pytest.mark.parametrize("size", [1, 63, 65, 200, 1025])
def test_gram_matrices_by_blocks_are_whole(size):
    rows = torch.randn(50, size, dtype=torch.float64)
    gram = torch.zeros(size, size, dtype=torch.float64)
    for part in rows.split(20):
        passes.observe.add_gram(gram, part)
    passes.observe.mirror(gram)
    assert torch.allclose(gram, rows.T @ rows, rtol=0, atol=1e-11)
