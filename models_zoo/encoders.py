"""Small random encoders and encoder-decoders, one function each."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

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


def swin() -> Entry:
    """Swin: window attention with shifts, two stages."""
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4
    )
    return random_entry(
        "swin",
        lambda: SwinForImageClassification(config),
        lambda: {"pixel_values": torch.randn(3, 3, 32, 32)},
    )


def convnext() -> Entry:
    """ConvNeXt of the transformers library."""
    config = ConvNextConfig(hidden_sizes=[12, 16], depths=[1, 2], num_stages=2, num_labels=5)
    return random_entry(
        "convnext-hf",
        lambda: ConvNextForImageClassification(config),
        lambda: {"pixel_values": torch.randn(3, 3, 32, 32)},
    )


def clip() -> Entry:
    """CLIP: a text and an image encoder that meet in a product."""
    shared = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {"vocab_size": 101, "intermediate_size": 48, "max_position_embeddings": 32}
    image = {"image_size": 16, "patch_size": 4, "intermediate_size": 48}
    config = CLIPConfig(
        text_config={**shared, **text, "bos_token_id": 0, "eos_token_id": 100},
        vision_config={**shared, **image},
        projection_dim=24,
    )
    return random_entry(
        "clip",
        lambda: CLIPModel(config),
        lambda: {
            "input_ids": torch.randint(3, 100, (3, 11)),
            "pixel_values": torch.randn(3, 3, 16, 16),
        },
    )


def t5() -> Entry:
    """T5: encoder-decoder, relative position bias, no scale, gated GELU."""
    config = T5Config(
        vocab_size=101,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        decoder_start_token_id=0,
    )
    return random_entry("t5", lambda: T5ForConditionalGeneration(config), _pair)


def _pair() -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.randint(3, 101, (3, 11)),
        "decoder_input_ids": torch.randint(3, 101, (3, 7)),
    }


def whisper() -> Entry:
    """Whisper: a convolutional stem, an audio encoder, a text decoder."""
    config = WhisperConfig(
        vocab_size=101,
        num_mel_bins=8,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_source_positions=16,
        max_target_positions=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        decoder_start_token_id=0,
    )
    return random_entry(
        "whisper",
        lambda: WhisperForConditionalGeneration(config),
        lambda: {
            "input_features": torch.randn(3, 8, 32),
            "decoder_input_ids": torch.randint(3, 101, (3, 7)),
        },
    )
