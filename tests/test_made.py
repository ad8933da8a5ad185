"""zeros_like and its kin: their places go with what they meet, not with the form."""

import pytest
import torch
from torch import nn

import fasp_graph as fg

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Accumulated(nn.Module):
    """A residual stream that starts from a tensor in the form of another one."""

    def __init__(self, start, width=12):
        super().__init__()
        self.start = start
        self.first, self.up, self.down = (
            nn.Linear(8, 12),
            nn.Linear(12, 20),
            nn.Linear(20, width),
        )

    def forward(self, x):
        f = self.first(x)
        return self.start(f) + self.down(torch.relu(self.up(f)))


class Met(nn.Module):
    """Zeros that meet their form later, head by head; and in a place beside it."""

    def __init__(self, beside):
        super().__init__()
        self.beside = beside
        self.first, self.last = nn.Linear(8, 12), nn.Linear(24 if beside else 12, 3)

    def forward(self, x):
        f = self.first(x).view(-1, 3, 4)
        if self.beside:
            return self.last(torch.cat([f, torch.ones_like(f)], -1).flatten(1))
        return self.last(torch.where(f > 0, f, torch.zeros_like(f)).flatten(1))


STARTS = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "full": lambda f: torch.full_like(f, 0.5),
    "typed": lambda f: torch.full_like(f, fill_value=2, dtype=torch.float64),
    "written": lambda f: torch.empty_like(f).fill_(0.25),
}


def pruned(model, sparsity=0.5):
    config = fg.Config(sparsity=sparsity, method="random", check=True)
    result = fg.prune(model.double().eval(), X, None, config)
    assert result.report.verify_max_error < 1e-12
    for rows in (5, 3):
        x = torch.randn(rows, 8, dtype=torch.float64)
        assert torch.allclose(result.model(x), result.graph_module(x), 0, 1e-12)
    return result


@pytest.mark.parametrize("start", STARTS)
def test_the_form_of_an_accumulator_is_pruned(start):
    torch.manual_seed(0)

    result = pruned(Accumulated(STARTS[start]))

    kinds = {group.name: group.kind for group in result.deps.groups}
    assert kinds["first.0"] == kinds["up.0"] == "chain" and kinds["down.0"] == "frozen"
    assert result.graph_module.first.weight.shape[0] < 12


def test_zeros_that_meet_their_form_go_with_it_head_by_head():
    torch.manual_seed(0)

    result = pruned(Met(False))

    (chain,) = [group for group in result.deps.groups if group.kind == "chain"]
    assert (chain.size, chain.blocks) == (12, 3)
    assert result.graph_module.first.weight.shape[0] == 6


def test_ones_beside_their_form_are_units_of_their_own():
    torch.manual_seed(0)

    result = pruned(Met(True))

    chains = [group for group in result.deps.groups if group.kind == "chain"]
    assert [(group.size, group.blocks) for group in chains] == [(12, 3), (12, 3)]
