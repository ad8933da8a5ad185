"""Modules that take the place of adapted or padded ones: PEFT's wrappers, copies to train."""

import copy

import pytest
import torch

from fasp_graph.emit.emission import Emission, apply_shapes
from passes.errors import FaspGraphError

KEPT = tuple(range(1, 10))
SHAPES = {"2.weight": (9, 16), "2.bias": (9,), "4.weight": (5, 9)}
AXIS = (-1, 12, KEPT)
ADAPTED = Emission(shapes=SHAPES, scatter={"2": AXIS}, gather={"4": AXIS})
PADDED = Emission(
    shapes=SHAPES,
    padded={"2.weight": ((0, 12, KEPT),), "2.bias": ((0, 12, KEPT),), "4.weight": ((1, 12, KEPT),)},
)
X = torch.linspace(-1, 1, 21).view(3, 7)


def small(mlp, recipe):
    model = apply_shapes(copy.deepcopy(mlp), recipe)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def with_lora(model, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config).eval()


def test_copies_that_are_trained_instead_take_the_adapters_along(mlp):
    model, before = small(mlp, ADAPTED), small(mlp, ADAPTED)(X)
    wrapped = with_lora(model, target_modules=["0"], modules_to_save=["2", "4"])
    with torch.no_grad():
        wrapped.base_model.model[0].lora_B.default.weight.zero_()
    assert torch.allclose(wrapped(X), before, atol=1e-5)

    with torch.no_grad():
        wrapped.base_model.model[4].modules_to_save.default.weight.mul_(2)
    tuned, merged = wrapped(X), wrapped.merge_and_unload()

    assert not torch.allclose(tuned, before)
    assert torch.allclose(merged(X), tuned, atol=1e-5)
    assert {k: tuple(v.shape) for k, v in merged.state_dict().items() if k in SHAPES} == SHAPES


def test_low_rank_factors_beside_padded_weights_are_refused(mlp):
    with pytest.raises(FaspGraphError, match="way padded.*target_modules"):
        with_lora(small(mlp, PADDED), target_modules=["2"])

    beside = with_lora(small(mlp, PADDED), target_modules="0", modules_to_save=["4"])
    tuned, merged = beside(X), beside.merge_and_unload()

    assert torch.allclose(merged(X), tuned, atol=1e-5)
    assert merged[2].parametrizations.weight.original.shape == (9, 16)
