"""A group that the rewriter cannot cut stays, with the reason; the others are pruned and proved."""

import importlib

import pytest
import torch
from torch import nn

import fasp_graph as fg
from passes.analysis import analysis
from passes.capture import capture
from passes.edits import EDITS
from passes.errors import VerificationError
from passes.rehearsal import refusals
from passes.rules import CUSTOM, register

DRIVER = importlib.import_module("fasp_graph.prune")
X = torch.randn(6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


WHOLE = "a.0.2"  # the places of each head that are not written


class Written(nn.Module):
    """Beside a plain chain, one whose first three places of each head are written, the same of all
    heads: the others may be other ones in each head, which no slice can tell.
    """

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (
            nn.Linear(m, n) for m, n in ((7, 12), (12, 5), (7, 9), (9, 5))
        )

    def forward(self, x):
        heads = torch.tanh(self.a(x)).view(-1, 2, 6)
        heads[..., :3] = heads[..., :3] * torch.linspace(1, 2, 3, dtype=x.dtype)
        return self.b(heads.flatten(1)) + self.d(torch.relu(self.c(x)))


def test_a_group_that_no_node_can_be_rewritten_for_stays_and_says_why():
    model = Written().double().eval()

    result = fg.prune(model, X, None, fg.Config(sparsity=0.3, method="magnitude", check=True))

    assert set(result.plan.kept) == {"a.0", "c.0"} and len(result.plan.kept["c.0"]) < 9
    assert result.report.verify_max_error < 1e-9
    (told,) = [f.reason for f in result.report.frozen if f.name == WHOLE]
    assert "it cannot be cut out" in told and "%slice_scatter" in told
    assert "test_rehearsal.py:" in told
    assert fg.analyze(model, X)[WHOLE].reason == told
    assert "it cannot be cut out" in result.report.to_text()


@pytest.fixture
def insistent():
    """A custom op that takes eight channels alone, under a rule that says it carries them."""

    @torch.library.custom_op("rehearsal::eight", mutates_args=())
    def eight(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 8:
            raise ValueError("eight channels, please")
        return torch.tanh(x)

    @eight.register_fake
    def _(x):
        if x.shape[-1] != 8:
            raise ValueError("eight channels, please")
        return torch.empty_like(x)

    @torch.library.custom_op("rehearsal::beside", mutates_args=())
    def beside(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 8:
            raise ValueError("eight channels beside others, please")
        return y.clone()

    @beside.register_fake
    def _(x, y):
        if x.shape[-1] != 8:
            raise ValueError("eight channels beside others, please")
        return torch.empty_like(y)

    register("rehearsal.eight", "... c -> ... c")
    register("rehearsal.beside", "... c, ... d -> ... d")
    yield
    del CUSTOM["rehearsal.eight"], CUSTOM["rehearsal.beside"]


class Insistent(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (
            nn.Linear(m, n) for m, n in ((7, 8), (8, 5), (7, 9), (9, 5))
        )

    def forward(self, x):
        return self.b(torch.ops.rehearsal.eight(self.a(x))) + self.d(torch.relu(self.c(x)))


@pytest.mark.usefixtures("insistent")
def test_a_group_whose_sizes_a_node_does_not_take_stays_and_says_why():
    config = fg.Config(sparsity=0.3, method="magnitude")

    result = fg.prune(Insistent().double().eval(), X, None, config)

    assert list(result.plan.kept) == ["c.0"]
    assert "eight channels, please" in result.deps["a.0"].reason
    assert "%eight" in result.deps["a.0"].reason


@pytest.mark.usefixtures("insistent")
def test_all_nodes_that_do_not_take_their_sizes_are_found_in_one_run():
    blocks = [nn.Sequential(Insistent(), nn.Linear(5, 7)) for _ in range(3)]
    found = capture(nn.Sequential(*blocks).double().eval(), X)
    deps = analysis(found.graph_module, found.inputs)
    kept = {g.name: (0, 2, 3) for g in deps.groups if g.name.endswith((".a.0", ".c.0"))}

    told = refusals(found.graph_module, found.inputs, deps, kept)

    assert len(kept) == 6 and set(told) == {f"{k}.0.a.0" for k in range(3)}


class Beside(Insistent):
    def forward(self, x):
        h = torch.ops.rehearsal.eight(self.a(x))
        y = torch.ops.rehearsal.beside(h, torch.relu(self.c(x)))
        return self.b(h) + self.d(y)


@pytest.mark.usefixtures("insistent")
def test_what_stays_anyway_takes_no_other_group_with_it():
    config = fg.Config(sparsity=0.3, method="magnitude")

    result = fg.prune(Beside().double().eval(), X, None, config)

    assert list(result.plan.kept) == ["c.0"] and "%eight" in result.deps["a.0"].reason


def test_what_shows_only_for_the_chosen_units_is_decided_anew(monkeypatch):
    """Without the rehearsal on units at random the refusal comes after the choice."""
    monkeypatch.setattr(DRIVER, "rehearsed", lambda module, inputs, deps: deps)
    model = Written().double().eval()
    with torch.no_grad():
        model.b.weight[:, [3, 11]] *= 1e-3  # another place of each head is of least use
    batches = (torch.randn(16, 7, dtype=torch.float64) for _ in range(3))  # can be read once

    result = fg.prune(model, X, batches, fg.Config(sparsity=0.2, method="fasp"))

    assert WHOLE not in result.plan.kept and result.deps[WHOLE].kind == "frozen"
    assert result.report.verify_max_error < 1e-9


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(7, n) for n in (8, 8, 5))

    def forward(self, x):
        q, k, v = self.q(x)[None], self.k(x)[None], self.v(x)[None]
        return nn.functional.scaled_dot_product_attention(q, k, v)


def test_wrong_numbers_are_never_taken_for_a_refusal(monkeypatch):
    """A softmax scale that follows the smaller head fits every shape."""
    monkeypatch.setitem(EDITS, "scaled_dot_product_attention", lambda edit: None)
    config = fg.Config(sparsity=0.2, method="magnitude", kinds=("bilinear",))

    with pytest.raises(VerificationError, match="differ"):
        fg.prune(Attention().double(), X, None, config)
