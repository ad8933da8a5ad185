"""Models as researchers write them: each is pruned where it can be, and computes what was promised.

Promised is: the compact graph equals the masked dense one (verified by the run itself), the user's
class made smaller equals the compact graph, and for chains both equal the user's own model with
zeros where its weights read a removed unit.
"""

import pytest
import torch
from research import MODELS, model_and_input
from trial import zeroed

import fasp_graph as fg
from passes.capture import outputs

CHAINS = {
    "squeeze and excite": {"a.0", "down.0"},
    "channel and spatial attention": {"mlp.0.0"},
    "gated convolution": {"a.0"},
    "convolution with GLU": {"a.0"},
    "hypernetwork": {"first.0"},
    "FiLM": {"a.0", "condition.0.0"},
    "mixture of softmaxes": {"body.0", "latent.0"},
    "perceiver": {"q.0", "v.0", "up.0"},
    "graph attention": {"a.0"},
    "slot attention": {"v.0", "mlp.0.0"},
    "Fourier mixing": {"up.0"},
    "Fourier operator": {"real.0", "mlp.0"},
    "state-space convolution": {"rate.0"},
    "pointer network": {"of_place.0"},
    "tied auto-encoder": {"w1.0", "w2.0"},
    "spatial transformer": {"look.0", "read.0", "a.0", "b.1"},
    "vector quantisation": {"a.0", "c.0"},
    "memory": {"keys.1", "values.1"},
    "masked tokens": {"token.0", "b.0", "c.0"},
    "memory by cosines": {"a.0"},
    "variational auto-encoder": {"enter.0", "mean.0", "mid.0"},
}
OTHERS = {  # kinds beside chains, and what they find
    "hypernetwork": {"make.0.blocks"},
    "capsules": {"vote.2", "vote.3", "vote.0.blocks"},
    "state-space convolution": {"rate.1"},
    "pointer network": {"encoder.weight_ih_l0.0"},
    "vector quantisation": {"b.0", "codes.0"},
    "memory": {"keys.0"},
    "memory by cosines": {"memory.1"},
    "group norm by hand": {"scale.1.blocks"},
}
SPARSITY = {  # of a model and a kind, where 0.3 takes too much or too little
    ("group norm by hand", "width"): 0.4,
    ("group norm by hand", "bilinear"): 0.4,
    ("group norm of two streams", "width"): 0.4,
    ("pointer network", "chain"): 0.05,
}


def pruned(name, kinds):
    model, x = model_and_input(name)
    share = SPARSITY.get((name, kinds[0]), 0.3)
    config = fg.Config(sparsity=share, method="random", kinds=kinds, check=True)
    result = fg.prune(model, x, None, config)
    _alike(result.graph_module, result.model, x)
    assert result.report.verify_max_error < 1e-9
    assert result.report.params_after < result.report.params_before
    return model, x, result


def _alike(left, right, x):
    """Also on other numbers than the captured ones; both draw the same random numbers."""
    other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for batch in (((x,), {}), ((other,), {})):
        for found, wanted in zip(outputs(left, batch), outputs(right, batch), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_are_found_and_pruned_exactly(name):
    model, x, result = pruned(name, ("chain",))

    assert set(result.plan.kept) == CHAINS[name]
    expected = zeroed(model, result.deps, {k: list(v) for k, v in result.plan.kept.items()})
    _alike(result.graph_module, expected, x)


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_can_go_is_found(name):
    _, _, result = pruned(name, ("bilinear", "head"))

    assert set(result.plan.kept) == OTHERS[name]


@pytest.mark.parametrize("name", ["group norm by hand", "group norm of two streams"])
def test_widths_under_group_norms_go_equally_from_each_group(name):
    _, _, result = pruned(name, ("width",))

    assert result.plan.kept


def test_every_model_has_a_row():
    assert set(MODELS) == {*CHAINS, *OTHERS, "group norm of two streams"}
