"""Rows of an array that hold other shares of groups than other rows: their places go together."""

import pytest
import torch
from research import JoinedGroupNorm
from torch import nn

import fasp_graph as fg

IMAGE = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pruned(model, kinds, sparsity=0.3, method="random"):
    config = fg.Config(sparsity=sparsity, method=method, kinds=kinds, check=True)
    return fg.prune(model.double().eval(), IMAGE, None, config)


@pytest.mark.parametrize(
    ("left", "right", "groups"), [(8, 8, 4), (4, 8, 2), (8, 16, 3), (6, 6, 12)]
)
def test_two_streams_under_one_group_norm_lose_equally_many_of_each_group(left, right, groups):
    torch.manual_seed(0)

    result = pruned(JoinedGroupNorm(left, right, groups), ("width", "chain"))

    assert result.report.verify_max_error < 1e-9 and result.plan.kept
    channels = result.graph_module.last.weight.shape[1]
    assert channels < left + right
    assert groups == left + right or channels % groups == 0


def test_streams_that_fill_whole_groups_are_chosen_apart():
    """Each stream has as many channels in every group: nothing is united. Groups go as a whole."""
    torch.manual_seed(0)
    deps = fg.analyze(Interleaved().double(), IMAGE, check=True)

    sizes = {g.name: (g.size, g.blocks) for g in deps.groups if g.kind != "frozen"}
    assert sizes == {"left.0": (6, 3), "right.0": (6, 3), "left.0.blocks": (3, 1)}
    result = pruned(Interleaved(), ("head", "width"), 0.6)
    assert result.report.verify_max_error < 1e-9
    assert len(result.plan.kept["left.0.blocks"]) < 3


class Interleaved(nn.Module):
    """Of every group of the norm, the first half is of one stream, the second of the other."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm, self.last = nn.GroupNorm(3, 12), nn.Conv2d(12, 4, 1)

    def forward(self, x):
        sides = [y.unflatten(1, (3, 2)) for y in (self.left(x), self.right(x))]
        return self.last(torch.relu(self.norm(torch.cat(sides, 2).flatten(1, 2))))


class Halves(nn.Module):
    """Two streams, stacked into heads of which each is one stream."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(5, 6), nn.Linear(5, 6), nn.Linear(6, 4)

    def forward(self, x):
        both = torch.cat([self.left(x), self.right(x)], -1)
        return self.last(torch.relu(both.unflatten(-1, (2, 6))).sum(-2))


def test_heads_of_different_streams_lose_the_same_places():
    torch.manual_seed(0)

    result = pruned(Halves(), ("chain",))

    (name,) = result.plan.kept
    assert result.deps[name].size == 6
    assert {m.parameter for m in result.deps[name].members} > {"left.weight", "right.weight"}
