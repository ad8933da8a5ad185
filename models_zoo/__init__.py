"""Models to prune: name -> model, example inputs, calibration batches, held-out tokens.

llama, opt      trained (models_zoo/train.py) on the standard library's source
the others      small, with random weights, one builder function each; plain PyTorch, or a small
                configuration of a transformers architecture

A builder's module is imported when the entry is built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .entry import Entry

__all__ = ["BUILDERS", "Entry", "load", "names"]


def _builder(module: str, function: str) -> Callable[[], Entry]:
    def build() -> Entry:
        return getattr(import_module(f".{module}", __name__), function)()

    return build


_TABLE = """
    llama             pretrained  llama
    opt               pretrained  opt
    opt-random        decoders    opt
    llama-random      decoders    llama
    gpt2              decoders    gpt2
    gpt-neox          decoders    gpt_neox
    phi3              decoders    phi3
    gptj              decoders    gptj
    falcon            decoders    falcon
    bloom             decoders    bloom
    mpt               decoders    mpt
    stablelm          decoders    stablelm
    olmo2             decoders    olmo2
    cohere            decoders    cohere
    qwen3             decoders    qwen3
    gemma3            decoders    gemma3
    mixtral           sparse      mixtral
    deepseek-v3       sparse      deepseek_v3
    gpt-oss           sparse      gpt_oss
    mamba             decoders    mamba
    bert              encoders    bert
    vit               encoders    vit
    swin              encoders    swin
    convnext-hf       encoders    convnext
    clip              encoders    clip
    t5                encoders    t5
    whisper           encoders    whisper
    resnet            vision      resnet
    mobilenet         mobile      mobilenet
    efficientnet      mobile      efficientnet
    densenet          mobile      densenet
    shufflenet        mobile      shufflenet
    convnext          mobile      convnext
    unet              unets       unet
    diffusion-unet    unets       diffusion
    nanogpt           attention   nanogpt
    gqa-qk-norm       attention   gqa
    relative-bias     attention   relative_bias
    moe               attention   experts
    nn-transformer    attention   transformer
    nn-multihead      attention   multihead
    vit-h-d-qkv       attention   vit_qkv_last
    vit-h-qkv-d       attention   vit_qkv_middle
    mlp-mixer         mixers      mixer
    window-attention  mixers      windows
    wavenet           mixers      wavenet
    kan               mixers      kan
    lstm              recurrent   lstm
    gru               recurrent   gru
    mamba-block       recurrent   mamba
    rwkv-block        recurrent   rwkv
"""

BUILDERS: dict[str, Callable[[], Entry]] = {
    name: _builder(module, function)
    for name, module, function in (line.split() for line in _TABLE.strip().splitlines())
}


def names() -> list[str]:
    """All names that `load` knows."""
    return list(BUILDERS)


def load(name: str) -> Entry:
    """Build or load one entry; KeyError names the known ones."""
    if name not in BUILDERS:
        raise KeyError(f"no zoo model {name!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name]()
