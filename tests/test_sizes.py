"""Sizes that modules state in tuples, lists and torch.Size shrink with their weights."""

import pytest
import torch
from torch import nn

import fasp_graph as fg
from fasp_graph.emit.emission import Emission
from fasp_graph.emit.sizes import both, own_sizes, replaces, size_of
from fasp_graph.folders.loading import _check_emission

CONFIG = fg.Config(sparsity=0.3, method="magnitude", kinds=("chain", "width"))


class Wide(nn.Module):
    """A norm over the width that is pruned, and a chain beside it."""

    def __init__(self, norm):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Linear(6, 16), norm, nn.Linear(16, 8)
        self.c, self.d = nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, x):
        h = self.a(x)
        return self.d(torch.relu(self.c(self.b(torch.tanh(self.norm(h) + h)))))


class Viewed(nn.Module):
    """Reads the shape of its heads from an attribute, as whatever kind of sequence it was given."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.shape = nn.Linear(6, 16), nn.Linear(16, 3), shape

    def forward(self, x):
        h = self.up(x).view(len(x), *self.shape)
        return self.down(torch.relu(h).flatten(1))


def drawn():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).double()


def pruned_and_loaded(build, folder):
    """What prune makes of it, after the class was seen to compute what the graph does, and what
    the saved folder gives.
    """
    x = drawn()
    pruned = fg.prune(build().double().eval(), x, None, CONFIG)
    torch.testing.assert_close(pruned.model(x), pruned.graph_module(x), rtol=0, atol=1e-12)
    fg.save(pruned, folder)
    loaded = fg.load(folder, model=build().double())
    torch.testing.assert_close(loaded(x), pruned.model(x), rtol=0, atol=1e-12)
    assert Emission.from_dict(pruned.emission.to_dict()) == pruned.emission
    return pruned, loaded


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm((16,)), lambda: nn.LayerNorm(16)])
def test_a_layer_norm_takes_the_new_width(norm, tmp_path):
    pruned, loaded = pruned_and_loaded(lambda: Wide(norm()), tmp_path / "small")

    assert set(pruned.emission.ways.values()) == {"native"}
    width = pruned.model.a.out_features
    assert width < 16 and type(pruned.model) is Wide
    for model in (pruned.model, loaded):
        assert model.norm.normalized_shape == (width,) == tuple(model.norm.weight.shape)


@pytest.mark.parametrize("kind", [tuple, list, torch.Size])
def test_a_sequence_stays_what_it_was(kind, tmp_path):
    pruned, loaded = pruned_and_loaded(lambda: Viewed(kind((2, 8))), tmp_path / "small")

    assert set(pruned.emission.ways.values()) == {"attributes"}
    for model in (pruned.model, loaded):
        assert type(model.shape) is kind and tuple(model.shape) == (2, model.down.in_features // 2)


class Table(nn.Module):
    """A leaf with a weight of two equal dims."""

    def __init__(self, shape):
        super().__init__()
        self.weight, self.shape = nn.Parameter(torch.zeros(4, 4)), shape


def test_a_tuple_that_is_the_weights_shape_is_the_new_one():
    assert own_sizes(Table((4, 4)), (4, 4), (4, 3)) == {"shape": (4, 3)}
    assert own_sizes(Table(4), (4, 4), (4, 3)) == {}
    assert own_sizes(Table([5, 4]), (9, 5, 4), (9, 5, 3)) == {"shape": (5, 3)}
    assert own_sizes(Table([4, 9]), (4, 5), (3, 5)) == {} == own_sizes(Table((4,)), (4, 5), (3, 5))
    assert own_sizes(nn.Conv2d(3, 3, 3), (3, 3, 3, 3), (3, 2, 3, 3)) == {"in_channels": 2}


def test_what_states_a_size():
    assert size_of(torch.Size([2, 3])) == (2, 3) == size_of([2, 3])
    assert [size_of(held) for held in (True, (), (1, "a"), (True,), "ab", 1.0)] == [None] * 6
    assert both((4, 8), (3, 8), (4, 6)) == (3, 6) and both(4, 4, 3) == 3
    assert replaces([1, 2], (3, 4)) and not replaces([1], (3, 4)) and not replaces(1, (3,))


@pytest.mark.parametrize("size", [[2], 16, [2, "a"], "ab", [2, 3.5]])
def test_a_folder_may_not_put_anything_else_in_place_of_a_tuple(size):
    emission = {"shapes": {}, "attributes": {"": {"shape": size}}, "padded": {}}
    with pytest.raises(fg.FaspGraphError, match="shape is no integer of the model"):
        _check_emission(Viewed((2, 8)), emission | {"scatter": {}, "gather": {}}, {})
