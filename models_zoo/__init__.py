"""Models to prune: name -> model, example inputs, calibration batches, held-out tokens.

llama, opt      trained (models_zoo/train.py) on the standard library's source
the others      small, with random weights, one builder function each; plain PyTorch, or a small
                configuration of a transformers architecture

The table says of each the module and function that build it, the class of its model and the number
of parameters. A builder's module is imported when the entry is built.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .entry import Entry

__all__ = ["BUILDERS", "MODELS", "Entry", "load", "names"]


def _builder(module: str, function: str) -> Callable[[], Entry]:
    def build() -> Entry:
        return getattr(import_module(f".{module}", __name__), function)()

    return build


_TABLE = """
    llama             pretrained  llama           LlamaForCausalLM                2755008
    opt               pretrained  opt             OPTForCausalLM                  3112320
    opt-random        decoders    opt             OPTForCausalLM                    42928
    llama-random      decoders    llama           LlamaForCausalLM                  45264
    gpt2              decoders    gpt2            GPT2LMHeadModel                   64560
    gpt-neox          decoders    gpt_neox        GPTNeoXForCausalLM                44608
    phi3              decoders    phi3            Phi3ForCausalLM                   45264
    gptj              decoders    gptj            GPTJForCausalLM                   65861
    falcon            decoders    falcon          FalconForCausalLM                 52752
    bloom             decoders    bloom           BloomForCausalLM                  61584
    mpt               decoders    mpt             MptForCausalLM                    27968
    stablelm          decoders    stablelm        StableLmForCausalLM               51648
    olmo2             decoders    olmo2           Olmo2ForCausalLM                  45392
    cohere            decoders    cohere          CohereForCausalLM                 40320
    qwen3             decoders    qwen3           Qwen3ForCausalLM                  51456
    gemma3            decoders    gemma3          Gemma3ForCausalLM                 46800
    mixtral           sparse      mixtral         MixtralForCausalLM                49888
    deepseek-v3       sparse      deepseek_v3     DeepseekV3ForCausalLM             40872
    gpt-oss           sparse      gpt_oss         GptOssForCausalLM                 32304
    mamba             decoders    mamba           MambaForCausalLM                  18560
    bert              encoders    bert            BertModel                         45280
    vit               encoders    vit             ViTModel                          47392
    swin              encoders    swin            SwinForImageClassification        22202
    convnext-hf       encoders    convnext        ConvNextForImageClassification     9337
    clip              encoders    clip            CLIPModel                         23105
    t5                encoders    t5              T5ForConditionalGeneration        46880
    whisper           encoders    whisper         WhisperForConditionalGeneration   28000
    resnet            vision      resnet          ResNet                            19218
    mobilenet         mobile      mobilenet       Sequential                         4186
    efficientnet      mobile      efficientnet    Sequential                         8294
    densenet          mobile      densenet        Sequential                         2980
    shufflenet        mobile      shufflenet      Sequential                         1642
    convnext          mobile      convnext        Sequential                         6366
    unet              unets       unet            UNet                              29652
    diffusion-unet    unets       diffusion       DiffusionUNet                     32147
    nanogpt           attention   nanogpt         Language                          24512
    gqa-qk-norm       attention   gqa             Language                          23488
    relative-bias     attention   relative_bias   Language                          16496
    moe               attention   experts         Language                          22272
    nn-transformer    attention   transformer     Seq2Seq                           25989
    nn-multihead      attention   multihead       Language                          18160
    vit-h-d-qkv       attention   vit_qkv_last    Patches                           12026
    vit-h-qkv-d       attention   vit_qkv_middle  Patches                           12026
    mlp-mixer         mixers      mixer           Mixer                              6986
    window-attention  mixers      windows         Windows                           16098
    wavenet           mixers      wavenet         WaveNet                            4760
    kan               mixers      kan             Sequential                         2217
    lstm              recurrent   lstm            Recurrent                         11294
    gru               recurrent   gru             Recurrent                          6054
    mamba-block       recurrent   mamba           Stack                             11141
    rwkv-block        recurrent   rwkv            Stack                              9917
"""

_ROWS = [line.split() for line in _TABLE.strip().splitlines()]
BUILDERS: dict[str, Callable[[], Entry]] = {
    name: _builder(module, function) for name, module, function, _, _ in _ROWS
}
MODELS: dict[str, tuple[str, int]] = {name: (kind, int(size)) for name, _, _, kind, size in _ROWS}


def names() -> list[str]:
    """All names that `load` knows."""
    return list(BUILDERS)


def load(name: str) -> Entry:
    """Build or load one entry; KeyError names the known ones."""
    if name not in BUILDERS:
        raise KeyError(f"no zoo model {name!r}; choose one of {', '.join(BUILDERS)}")
    return BUILDERS[name]()
