"""Modules that take the place of adapted or padded ones: PEFT's wrappers, copies to train."""

import copy

import pytest
import torch
import transformers as tf
from torch import nn

import fasp_graph as fg
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


def deepseek():
    """Its query is low-rank with a norm between the factors."""
    config = tf.DeepseekV3Config(
        **{"vocab_size": 101, "hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 80},
        **{"num_attention_heads": 6, "num_key_value_heads": 6, "moe_intermediate_size": 32},
        **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1},
        **{"first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 8},
        **{"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "max_position_embeddings": 64},
    )
    return tf.DeepseekV3ForCausalLM(config), torch.randint(3, 101, (3, 11))


class Normed(nn.Module):
    """A table and a convolution, each with code behind it that has the width burned in."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.down = nn.Embedding(20, 12), nn.RMSNorm(12), nn.Linear(12, 8)
        self.conv, self.out = nn.Conv1d(8, 14, 3, padding=1), nn.Linear(14, 4)

    def forward(self, ids):
        x = self.down(self.norm(self.table(ids)))
        return self.out(torch.relu(self.conv(x.mT)).mT.reshape(*ids.shape, 14))


def normed():
    return Normed(), torch.randint(20, (3, 11))


@pytest.mark.parametrize("build", [deepseek, normed])
def test_layers_beside_adapters_say_their_compact_sizes(build):
    torch.manual_seed(0)
    dense, ids = build()
    pruned = fg.prune(dense.eval(), (ids,), None, fg.Config(0.3, method="magnitude"))
    model, emission = copy.deepcopy(pruned.model), pruned.emission
    bare = {"model.embed_tokens", "lm_head"}
    layers = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv1d)) and path not in bare
    }

    assert emission.scatter.keys() & layers.keys() and emission.gather.keys() & layers.keys()
    assert emission.padded  # the norm between the two works at the old width
    for module in layers.values():
        names = {nn.Embedding: ("num_embeddings", "embedding_dim"), nn.Linear: ("out_features",)}
        stated = [getattr(module, n) for n in names.get(type(module), ("out_channels",))]
        assert stated == list(module.weight.shape[: len(stated)])

    wrapped = with_lora(model, target_modules=list(layers))
    before, tuned = outputs(pruned.model, ids), outputs(wrapped, ids)
    merged = wrapped.merge_and_unload()

    assert not torch.allclose(tuned, before, atol=1e-3)
    assert torch.allclose(outputs(merged, ids), tuned, atol=1e-4)
    assert {k: v.shape for k, v in merged.state_dict().items()} == {
        k: v.shape for k, v in pruned.model.state_dict().items()
    }


def outputs(model, ids):
    with torch.no_grad():
        found = model(ids)
    return getattr(found, "logits", found)
