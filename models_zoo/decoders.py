"""Small random decoders, one function each."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
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
