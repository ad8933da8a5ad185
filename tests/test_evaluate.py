"""Perplexity against the definition, FLOPs against arithmetic."""

import math
from types import SimpleNamespace

import pytest
import torch
from programs_of_zoo import program
from torch import nn

import fasp_graph as fg
from fasp_graph.evaluate import flops, logits_of, size_of, spread


class Constant(nn.Module):
    """A uniform language model over `size` tokens."""

    def __init__(self, size, wrap):
        super().__init__()
        self.size, self.wrap = size, wrap

    def forward(self, tokens):
        return self.wrap(torch.zeros(*tokens.shape, self.size))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda logits: logits,
        lambda logits: (logits, None),
        lambda logits: {"logits": logits},
        lambda logits: SimpleNamespace(logits=logits),
    ],
    ids=["tensor", "tuple", "dict", "object"],
)
def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(wrap):
    tokens = torch.randint(0, 11, (5, 9))

    assert fg.perplexity(Constant(11, wrap), tokens, batch=2) == pytest.approx(11, rel=1e-6)


def test_perplexity_is_the_models_own_loss_and_the_graph_agrees():
    entry, known = program("llama-random")
    tokens = torch.randint(3, 90, (7, 13), generator=torch.Generator().manual_seed(0))

    with torch.no_grad():
        expected = math.exp(entry.model(tokens, labels=tokens).loss)
    graph = known.captured.graph_module
    assert fg.perplexity(entry.model, tokens, batch=3) == pytest.approx(expected, rel=1e-5)
    assert fg.perplexity(graph, tokens, batch=4) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("count", "chosen"), [(1, [0]), (3, [0, 5, 10]), (99, [*range(11)])])
def test_fewer_windows_are_spread_over_all(count, chosen):
    windows = torch.arange(11).repeat(4, 1).T

    assert spread(windows, count)[:, 0].tolist() == chosen


def test_perplexity_leaves_the_mode_as_it_was():
    model = Constant(5, lambda logits: logits).train()

    fg.perplexity(model, torch.zeros(2, 4, dtype=torch.long))

    assert model.training


@pytest.mark.parametrize("shape", [(3,), (3, 1), (0, 4)])
def test_tokens_of_the_wrong_form(shape):
    with pytest.raises(fg.FaspGraphError, match="tokens of shape"):
        fg.perplexity(Constant(5, lambda logits: logits), torch.zeros(shape, dtype=torch.long))


def test_outputs_without_logits():
    with pytest.raises(fg.FaspGraphError, match="logits"):
        logits_of(torch.zeros(2, 3))


def test_flops_of_a_linear_layer():
    assert flops(nn.Linear(7, 5), (torch.zeros(3, 7),)) == 2 * 3 * 7 * 5


def test_flops_count_attention_of_any_head_size():
    q, v = torch.zeros(1, 2, 6, 8), torch.zeros(1, 2, 6, 4)

    class Attention(nn.Module):
        def forward(self, q, k, v):
            return nn.functional.scaled_dot_product_attention(q, k, v)

    assert flops(Attention(), (q, q, q)) == 2 * 2 * 6 * 6 * (8 + 8)
    assert flops(Attention(), (q, q, v)) == 2 * 2 * 6 * 6 * (8 + 4)


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight

    assert size_of(model) == (16, 64)
