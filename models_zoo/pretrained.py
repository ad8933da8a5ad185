"""The bundled trained language models: Hugging Face folders under data/, float16 on disk,
float32 in memory.
"""

from __future__ import annotations

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from .entry import Entry
from .text import documents, token_stream, windows
from .train import CONTEXT, DATA

CALIBRATION_WINDOWS, HELDOUT_WINDOWS, BATCH = 64, 96, 16


def _load(name: str) -> Entry:
    folder = DATA / name
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    encode = tokenizer.backend_tokenizer
    calibration = windows(
        token_stream(documents("calibration"), encode), CONTEXT, CALIBRATION_WINDOWS
    )
    heldout = windows(token_stream(documents("heldout"), encode), CONTEXT, HELDOUT_WINDOWS)
    batches = [{"input_ids": rows} for rows in calibration.split(BATCH)]
    return Entry(name, model, {"input_ids": heldout[:3, :17].clone()}, batches, heldout, tokenizer)


def llama() -> Entry:
    """LLaMA's architecture, 2.7M parameters, trained on Python source."""
    return _load("llama")


def opt() -> Entry:
    """OPT's architecture, 3.1M parameters, trained on Python source."""
    return _load("opt")
