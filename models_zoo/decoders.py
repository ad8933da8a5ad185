"""Small random decoders, one function each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MptConfig,
    MptForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from .entry import Entry, random_entry

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_COMMON: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    **_SPECIAL,
}


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, 101, (3, 11))}


def opt() -> Entry:
    """OPT: LayerNorm, biases, learned positions, ReLU."""
    config = OPTConfig(**_COMMON, ffn_dim=80, word_embed_proj_dim=48, dropout=0.0)
    return random_entry("opt-random", lambda: OPTForCausalLM(config), _tokens)


def llama() -> Entry:
    """LLaMA: RMSNorm, rotary positions, grouped-query attention (2 KV heads), SwiGLU."""
    config = LlamaConfig(**_COMMON, num_key_value_heads=2, intermediate_size=80)
    return random_entry("llama-random", lambda: LlamaForCausalLM(config), _tokens)


def gpt2() -> Entry:
    """GPT-2: fused QKV as a transposed linear layer."""
    config = GPT2Config(
        vocab_size=101,
        n_embd=48,
        n_layer=2,
        n_head=6,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_SPECIAL,
    )
    return random_entry("gpt2", lambda: GPT2LMHeadModel(config), _tokens)


def gpt_neox() -> Entry:
    """GPT-NeoX: QKV interleaved per head, partial rotary positions, parallel residual."""
    config = GPTNeoXConfig(**_COMMON, intermediate_size=80)
    return random_entry("gpt-neox", lambda: GPTNeoXForCausalLM(config), _tokens)


def phi3() -> Entry:
    """Phi-3: fused QKV with 2 KV heads, fused gate and up."""
    config = Phi3Config(**_COMMON, num_key_value_heads=2, intermediate_size=80)
    return random_entry("phi3", lambda: Phi3ForCausalLM(config), _tokens)


def gptj() -> Entry:
    """GPT-J: partial interleaved rotary positions, parallel residual."""
    config = GPTJConfig(
        vocab_size=101, n_embd=48, n_layer=2, n_head=6, n_positions=64, rotary_dim=4, **_SPECIAL
    )
    return random_entry("gptj", lambda: GPTJForCausalLM(config), _tokens)


def falcon() -> Entry:
    """Falcon: one KV head for all queries, fused QKV, parallel residual."""
    config = FalconConfig(**_COMMON, multi_query=True, parallel_attn=True)
    return random_entry("falcon", lambda: FalconForCausalLM(config), _tokens)


def bloom() -> Entry:
    """BLOOM: alibi positions, QKV interleaved per head. (It insists on head counts that split.)"""
    config = BloomConfig(vocab_size=101, hidden_size=48, n_layer=2, n_head=6, **_SPECIAL)
    return random_entry("bloom", lambda: BloomForCausalLM(config), _tokens)


def mpt() -> Entry:
    """MPT: alibi positions, fused QKV, no biases."""
    config = MptConfig(
        vocab_size=101, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, expansion_ratio=3
    )
    return random_entry("mpt", lambda: MptForCausalLM(config), _tokens)


def stablelm() -> Entry:
    """StableLM: LayerNorm, partial rotary positions."""
    config = StableLmConfig(**_COMMON, num_key_value_heads=6, intermediate_size=80)
    return random_entry("stablelm", lambda: StableLmForCausalLM(config), _tokens)


def olmo2() -> Entry:
    """OLMo 2: norms after the layers, and over all heads of queries and keys together."""
    config = Olmo2Config(**_COMMON, num_key_value_heads=2, intermediate_size=80)
    return random_entry("olmo2", lambda: Olmo2ForCausalLM(config), _tokens)


def cohere() -> Entry:
    """Cohere: parallel residual, interleaved rotary positions, scaled and tied head."""
    config = CohereConfig(**_COMMON, num_key_value_heads=2, intermediate_size=80, logit_scale=1.0)
    return random_entry("cohere", lambda: CohereForCausalLM(config), _tokens)


def qwen3() -> Entry:
    """Qwen3: RMSNorm on every head's queries and keys, head width apart from the hidden size."""
    config = Qwen3Config(**_COMMON, num_key_value_heads=2, head_dim=12, intermediate_size=80)
    return random_entry("qwen3", lambda: Qwen3ForCausalLM(config), _tokens)


def gemma3() -> Entry:
    """Gemma 3: a window in every other layer, norms before and after, tied head."""
    config = Gemma3TextConfig(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=80,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    )
    return random_entry("gemma3", lambda: Gemma3ForCausalLM(config), _tokens)


def mamba() -> Entry:
    """Mamba: a selective state space, no attention."""
    config = MambaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=2, state_size=4, **_SPECIAL
    )
    return random_entry("mamba", lambda: MambaForCausalLM(config), _tokens)
