"""Integer inputs that sizes are computed from (grids of packed images) are held as constants: the
graph says so to whoever gives others, the user's own class goes on to take any.
"""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from trial import zeroed

import fasp_graph as fg
from fasp_graph.prune import read
from passes.capture import capture
from passes.errors import CalibrationError, CaptureError, UnsupportedOp
from passes.held import held_inputs

GRID = torch.tensor([[2, 3], [2, 2]])
OTHER = torch.tensor([[1, 3], [7, 1]])


class Packed(nn.Module):
    """Attention within each image of a packed row; `grid` holds the images' sizes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.qkv, self.out = nn.Linear(12, 16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x, grid):
        h = self.embed(x)
        parts = self.qkv(h).view(len(x), 3, 2, 8).permute(1, 2, 0, 3)
        lengths = grid.prod(-1).tolist()
        images = zip(*(part.split(lengths, 1) for part in parts), strict=True)
        mixed = torch.cat([scaled_dot_product_attention(*image) for image in images], 1)
        h = h + self.out(mixed.transpose(0, 1).reshape(len(x), -1))
        return self.down(torch.relu(self.up(h)))


def drawn(grid=GRID, count=4):
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(10, 12, generator=generator), "grid": grid} for _ in range(count)]


@pytest.fixture(scope="module")
def known():
    return read(Packed().eval(), drawn()[0], check=True)


@pytest.fixture(scope="module")
def pruned(known):
    inputs, *calibration = drawn()
    config = fg.Config(sparsity=0.3, check=True)
    return fg.prune(Packed().eval(), inputs, calibration, config, program=known)


def test_every_layer_goes_and_the_class_takes_other_grids(pruned, known):
    kept = pruned.plan.kept
    assert {pruned.deps[name].size for name in kept} == {16, 32}
    assert isinstance(pruned.model, Packed)
    x = drawn()[0]["x"]
    config = fg.Config(0.3, method="magnitude")
    magnitude = fg.prune(Packed().eval(), drawn()[0], None, config, program=known)
    expected = zeroed(Packed().eval(), magnitude.deps, magnitude.plan.kept)
    for grid in (GRID, OTHER):
        torch.testing.assert_close(
            magnitude.model(x, grid), expected(x, grid), rtol=1e-4, atol=1e-5
        )


def test_the_graph_refuses_other_numbers(pruned, known):
    given = drawn(OTHER)
    with pytest.raises(RuntimeError, match="grid is not what it was in the example inputs"):
        pruned.graph_module(**given[0])
    with pytest.raises(CalibrationError, match="grid is not what it was"):
        fg.prune(Packed().eval(), drawn()[0], given, fg.Config(method="fasp"), program=known)


def test_onnx_takes_what_may_vary(pruned, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = fg.export_onnx(pruned, tmp_path / "packed.onnx")
    session = onnxruntime.InferenceSession(str(path))
    assert [entry.name for entry in session.get_inputs()] == ["x"]
    (given,) = drawn(count=1)
    (found,) = session.run(None, {"x": given["x"].numpy()})
    expected = pruned.graph_module(**given).detach().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


class Calls(nn.Module):
    """Two layers, and a forward that is a function of them and the inputs."""

    def __init__(self, forward):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.call = nn.Linear(6, 8), nn.Linear(8, 3), forward

    def forward(self, *inputs):
        return self.call(self, *inputs)


def in_parts(m, x, lengths, scale=1.0):
    parts = torch.relu(m.a(x)).split(lengths)
    return m.b(torch.cat([part * k for k, part in enumerate(parts)])) * scale


def of_lengths(m, x, lengths):
    parts = m.b(torch.relu(m.a(x))).split(lengths.tolist())
    return torch.stack([part.sum(0) for part in parts])


def up_to_the_longest(m, x, lengths):
    h = torch.relu(m.a(x))[:, : int(lengths.max())]
    there = torch.arange(h.shape[1]) < lengths[:, None]
    return m.b((h * there[..., None]).sum(1))


def small(forward, *inputs):
    config = fg.Config(sparsity=0.3, method="magnitude", check=True)
    return fg.prune(Calls(forward).eval(), inputs, None, config)


def test_the_graph_refuses_other_constants_and_other_shapes():
    x = torch.randn(9, 6)
    pruned = small(in_parts, x, [2, 3, 4], 2.0)
    assert pruned.model.a.weight.shape[0] < 8
    for others in ([5, 3, 1], 2.0), ([2, 3, 4], 1.0):
        with pytest.raises(AssertionError, match="for which alone the graph was captured"):
            pruned.graph_module(x, *others)
    held = small(of_lengths, x, torch.tensor([3, 3, 3]))
    assert "the model takes any" in held.report.notes[0]
    for lengths in ([3], [3, 3], [2, 3, 4]):
        with pytest.raises(RuntimeError):
            held.graph_module(x, torch.tensor(lengths))


def test_lengths_may_share_the_batch():
    x, lengths = torch.randn(4, 7, 6), torch.tensor([7, 5, 3, 2])
    pruned = small(up_to_the_longest, x, lengths)
    torch.testing.assert_close(pruned.graph_module(x, lengths), pruned.model(x, lengths))


def test_a_generator_of_the_models_own_is_refused():
    def drawn_anew(m, x):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
        return m.b(torch.relu(m.a(x[:, order])))

    with pytest.raises(CaptureError, match="generator.*help.*buffer"):
        small(drawn_anew, torch.randn(5, 6))


def test_the_fewest_inputs_are_held():
    def two(m, x, lengths, rows):
        return torch.cat([part[:1] for part in m.b(m.a(x))[rows].split(lengths.tolist())])

    inputs = (torch.randn(9, 6), torch.tensor([4, 5]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8]))
    program = capture(Calls(two).eval(), inputs)
    assert held_inputs(program.graph_module) == {1}


@pytest.mark.parametrize("count", [3, 4, 6])
def test_as_many_inputs_are_held_as_sizes_need(count):
    def all_of(m, x, *each):
        h = torch.relu(m.a(x))
        return sum(m.b(torch.stack([p.sum(0) for p in h.split(n.tolist())])) for n in each)

    x, lengths = torch.randn(9, 6), [torch.tensor([2, 3, 4])] * count
    pruned = small(all_of, x, *lengths)
    assert held_inputs(pruned.graph_module) == set(range(1, count + 1))
    (note,) = pruned.report.notes
    assert all(f"inputs_{k}" in note for k in range(1, count + 1)), note
    others = [torch.tensor([4, 4, 1])] * count
    expected = zeroed(Calls(all_of).eval(), pruned.deps, pruned.plan.kept)
    torch.testing.assert_close(pruned.model(x, *others), expected(x, *others))
    with pytest.raises(RuntimeError, match="is not what it was in the example inputs"):
        pruned.graph_module(x, *lengths[1:], others[0])


class Repeated(nn.Module):
    """Sizes from the tokens themselves, and no other input."""

    def forward(self, ids):
        return torch.ones(6, 4).split(ids.tolist())


class Padded(nn.Module):
    """A mask that the model makes itself decides: its numbers are constants."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 16), nn.Linear(16, 4)

    def forward(self, x):
        mask = torch.tensor([True, True, False, True])
        return self.b(torch.relu(self.a(x[:, : int(mask.sum())])))


def test_only_what_sizes_need_is_held():
    mlp = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    program = capture(mlp, torch.randint(0, 9, (3, 5)))
    assert not held_inputs(program.graph_module)
    assert program.dynamic_shapes is not None
    with pytest.raises(UnsupportedOp, match=r"computed from the numbers in a tensor.*help"):
        fg.analyze(Repeated(), torch.tensor([2, 1, 3]))
    deps = fg.analyze(Padded(), torch.randn(5, 4, 7))
    assert [group.size for group in deps.groups if group.kind == "chain"] == [16]
