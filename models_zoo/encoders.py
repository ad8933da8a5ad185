"""Small random encoders, one function each."""

from __future__ import annotations

import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

from .entry import Entry, random_entry


def bert() -> Entry:
    """BERT with its pooler."""
    config = BertConfig(
        vocab_size=101,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=80,
        max_position_embeddings=64,
    )
    return random_entry(
        "bert", lambda: BertModel(config), lambda: {"input_ids": torch.randint(3, 101, (3, 11))}
    )


def vit() -> Entry:
    """ViT on 32 x 32 images, 16 patches."""
    config = ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        intermediate_size=80,
        image_size=32,
        patch_size=8,
    )
    return random_entry(
        "vit", lambda: ViTModel(config), lambda: {"pixel_values": torch.randn(3, 3, 32, 32)}
    )
