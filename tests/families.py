"""Models of the acceptance test: one tiny builder per transformers family, seeded random weights;
and trained models, where they lie beside the project. One layer each, for time; llama has two.

`kind` says what a user does with the model: decoder and seq2seq generate, encoder predicts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf

import fasp_graph as fg
from fasp_graph.prune import Program, read
from passes.capture import as_args
from passes.compare import tensors
from passes.free_axes import free_axes

VOCABULARY = 101
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 6,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    **_SPECIAL,
}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Family:
    """`build` makes a model, `batch(n, t)` an input of batch n and length t; `lora` are the modules
    that low-rank factors may stand beside.
    """

    kind: str
    build: Callable[[], Any]
    batch: Callable[[int, int], dict[str, torch.Tensor]]
    lora: Any = "all-linear"


def tokens(n: int = 3, t: int = 11) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (n, t))}


def images(n: int = 3, t: int = 0) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def pairs(n: int = 3, t: int = 11) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (n, t))
    return {
        "input_ids": ids,
        "decoder_input_ids": torch.randint(3, VOCABULARY, (n, 5)),
        "use_cache": False,
    }


def speech(n: int = 3, t: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (n, 5))
    return {"input_features": torch.randn(n, 8, 40), "decoder_input_ids": ids, "use_cache": False}


def _opt() -> Any:
    kept = {k: v for k, v in _TEXT.items() if k != "intermediate_size"}
    config = tf.OPTConfig(**kept, ffn_dim=80, word_embed_proj_dim=48, dropout=0.0)
    return tf.OPTForCausalLM(config)


def _gpt2() -> Any:
    config = tf.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=48,
        n_layer=1,
        n_head=6,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_SPECIAL,
    )
    return tf.GPT2LMHeadModel(config)


def _llama() -> Any:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**_GROUPED | {"num_hidden_layers": 2}))


def _gemma3() -> Any:
    config = tf.Gemma3TextConfig(
        **_GROUPED, query_pre_attn_scalar=8, sliding_window=16, layer_types=None
    )
    return tf.Gemma3ForCausalLM(config)


def _mixtral() -> Any:
    config = tf.MixtralConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    return tf.MixtralForCausalLM(config)


def _t5() -> Any:
    config = tf.T5Config(
        vocab_size=VOCABULARY,
        d_model=48,
        d_kv=8,
        d_ff=80,
        num_layers=1,
        num_heads=6,
        dropout_rate=0.0,
        decoder_start_token_id=2,
        eos_token_id=1,
        pad_token_id=2,
    )
    return tf.T5ForConditionalGeneration(config)


def _whisper() -> Any:
    config = tf.WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=8,
        d_model=48,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=6,
        decoder_attention_heads=6,
        encoder_ffn_dim=80,
        decoder_ffn_dim=80,
        max_source_positions=20,
        max_target_positions=64,
        decoder_start_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **_SPECIAL,
    )
    return tf.WhisperForConditionalGeneration(config)


def _bert() -> Any:
    kept = {k: v for k, v in _TEXT.items() if k not in _SPECIAL}
    return tf.BertForSequenceClassification(tf.BertConfig(**kept, num_labels=5))


def _vit() -> Any:
    config = tf.ViTConfig(
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=6,
        intermediate_size=80,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return tf.ViTForImageClassification(config)


def _mamba() -> Any:
    config = tf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=48, state_size=4, num_hidden_layers=1, **_SPECIAL
    )
    return tf.MambaForCausalLM(config)


def _trained(name: str) -> Any:
    return tf.AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)


FAMILIES = {
    "opt": Family("decoder", _opt, tokens),
    "llama": Family("decoder", _llama, tokens),
    "qwen3": Family("decoder", lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**_GROUPED)), tokens),
    "gemma3": Family("decoder", _gemma3, tokens),
    "phi3": Family(
        "decoder",
        lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**_TEXT, num_key_value_heads=2)),
        tokens,
    ),
    "gpt2": Family("decoder", _gpt2, tokens),
    "gpt-neox": Family("decoder", lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**_TEXT)), tokens),
    "mistral": Family(
        "decoder",
        lambda: tf.MistralForCausalLM(tf.MistralConfig(**_GROUPED, sliding_window=None)),
        tokens,
    ),
    "mixtral": Family("decoder", _mixtral, tokens),
    "t5": Family("seq2seq", _t5, pairs),
    "whisper": Family("seq2seq", _whisper, speech),
    "bert": Family("encoder", _bert, tokens),
    "vit": Family("encoder", _vit, images),
    "mamba": Family("decoder", _mamba, tokens, ["in_proj", "x_proj"]),
}
ASSETS = Path(__file__).parents[2] / "shared" / "assets"
TRAINED = {
    name: Family("decoder", functools.partial(_trained, name), tokens)
    for name in ("stories260K-hf", "opt-wikitext-hf")
    if (ASSETS / name).is_dir()
}
EVERY = FAMILIES | TRAINED


def build(name: str) -> Any:
    """The model in eval mode; vectors of random ones are moved off their defaults, so that they
    matter.
    """
    torch.manual_seed(0)
    model = EVERY[name].build().eval()
    with torch.no_grad():
        for parameter in model.parameters() if name in FAMILIES else ():
            scale = 0.1 if parameter.dim() == 1 else 0.05
            parameter.add_(scale * torch.randn_like(parameter))
    return model


@functools.cache
def program(name: str) -> tuple[Any, dict[str, torch.Tensor], Program]:
    """The model, its example inputs, and what was read of it: once for all tests."""
    model, inputs = build(name), EVERY[name].batch(3, 11)
    return model, inputs, read(model, inputs)


@functools.cache
def pruned(name: str, sparsity: float = 0.3, **options: Any) -> fg.Pruned:
    """The model pruned; shared by the tests, which copy what they change."""
    model, inputs, known = program(name)
    batches = [EVERY[name].batch(4, 11) for _ in range(2)]
    return fg.prune(model, inputs, batches, fg.Config(sparsity, **options), program=known)


def prompt(name: str, n: int = 2) -> dict[str, torch.Tensor]:
    """What `generate` starts from."""
    inputs = EVERY[name].batch(n, 6)
    return {k: v for k, v in inputs.items() if k not in ("decoder_input_ids", "use_cache")}


def free_length(name: str) -> bool:
    """Whether the graph holds for any number of tokens; some code unrolls the sequence."""
    captured = program(name)[2].captured
    return any(1 in axes for axes in free_axes(captured.graph_module, captured.inputs).values())


def output(model: Any, inputs: Any) -> torch.Tensor:
    """The first output, without gradients."""
    args = as_args(inputs)
    with torch.no_grad():
        return tensors(model(*args[0], **args[1]))[0]
