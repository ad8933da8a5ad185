"""Forty model types of transformers, spread over what engines meet: each is built small, captured,
analysed; half of all chain, bilinear and head groups goes and the rest is exact.

    decoders    dense, grouped queries, latent and differential attention, alibi, shared values
    sparse      experts with and without shared ones, sinks
    recurrent   state space layers, hybrids
    norms       over the channels of an MLP, a head, a recurrence
    encoders    of text, images, audio; pyramids; pairs of towers; encoder-decoders
"""

import pytest

from benchmarks import coverage
from benchmarks.cover_type import cover

NAMES = """
    albert bart beit bert biogpt bloom clip cohere2 deberta-v2 dinov2 electra ernie4_5_moe
    falcon_mamba gemma glm4_moe gpt2 gpt_neox gpt_oss granite jamba llama mixtral mpt olmoe
    opt phi3 pvt qwen3_moe resnet segformer siglip t5 vit wav2vec2 whisper apertus
    bitnet convnextv2 diffllama mamba2
"""


@pytest.mark.parametrize("model_type", NAMES.split())
def test_a_type_is_exact_and_every_layer_has_a_chain(model_type):
    row = cover(model_type, dynamic=False)

    assert row["stage"] == "done", coverage.why(row)
    assert "unchecked" not in row
    assert all(error is None or error <= coverage.EXACT for error in row["verified"].values())
    assert row["verified"]["chain"] is not None and coverage.why(row) == ""
