"""Small random mixtures of experts, one function each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from .entry import Entry, random_entry

_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def _entry(name: str, build: Callable[[], PreTrainedModel]) -> Entry:
    def with_products() -> PreTrainedModel:
        model = build()
        model.set_experts_implementation("batched_mm")  # grouped_mm wants rows of 16 bytes
        return model

    tokens = {"size": (3, 11), "low": 3, "high": 101}
    return random_entry(name, with_products, lambda: {"input_ids": torch.randint(**tokens)})


def mixtral() -> Entry:
    """Mixtral: four experts, two for each token, 2 KV heads."""
    config = MixtralConfig(
        **_COMMON,
        num_key_value_heads=2,
        intermediate_size=48,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return _entry("mixtral", lambda: MixtralForCausalLM(config))


def deepseek_v3() -> Entry:
    """DeepSeek-V3: latent attention, one dense layer, then routed and shared experts in groups."""
    config = DeepseekV3Config(
        **_COMMON,
        num_key_value_heads=4,
        intermediate_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=20,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return _entry("deepseek-v3", lambda: DeepseekV3ForCausalLM(config))


def gpt_oss() -> Entry:
    """GPT-OSS: attention sinks, a window in every other layer, clamped experts with biases."""
    config = GptOssConfig(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=24,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
        rope_parameters={
            **GptOssConfig().rope_parameters,  # YaRN, stretched fourfold to the length of _COMMON
            "factor": 4.0,
            "original_max_position_embeddings": _COMMON["max_position_embeddings"] // 4,
        },
    )
    return _entry("gpt-oss", lambda: GptOssForCausalLM(config))
