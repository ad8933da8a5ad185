"""Train the bundled language models: `python -m models_zoo.train [llama|opt]`, or both.

Text: models_zoo/text.py. Tokens: byte-level BPE of about 2k, learnt on the train split and shared
by both models. Loss: next-token cross-entropy. AdamW, linear warm-up, cosine decay, a fresh window
offset each epoch. Everything is drawn from one seed. The result is a Hugging Face folder with
float16 weights and training.json (settings, held-out and unigram perplexity).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from .text import BOS, EOS, PAD, documents, token_stream, unigram_perplexity, windows

DATA = Path(__file__).parent / "data"
ARCHITECTURES = ("llama", "opt")
VOCABULARY, CONTEXT = 2048, 256


@dataclass(frozen=True)
class Settings:
    """What a training run depends on, besides the text."""

    architecture: str
    epochs: float = 1.6
    batch: int = 16
    learning_rate: float = 2.5e-3
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    seed: int = 0
    device: str = "cpu"
    autocast: bool = True


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE: no text is unknown, decoding is exact."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def build(architecture: str) -> PreTrainedModel:
    """An untrained model of about 3M parameters with tied embeddings and a context of 256
    tokens.
    """
    shared = {
        "vocab_size": VOCABULARY,
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "num_attention_heads": 6,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**shared, num_key_value_heads=2, intermediate_size=512))
    if architecture == "opt":
        return OPTForCausalLM(
            OPTConfig(**shared, ffn_dim=768, word_embed_proj_dim=192, dropout=0.0)
        )
    raise SystemExit(f"no builder for {architecture!r}; choose llama or opt")


def heldout_perplexity(model: PreTrainedModel, rows: torch.Tensor) -> float:
    """exp of the mean next-token loss over windows [N, CONTEXT]; the first token is not scored."""
    model.eval()
    with torch.no_grad():
        losses = [model(chunk, labels=chunk).loss * len(chunk) for chunk in rows.split(16)]
    return math.exp(torch.stack(losses).sum().item() / len(rows))


def train(model: PreTrainedModel, stream: torch.Tensor, settings: Settings) -> None:
    """Minimise the next-token loss over `stream`, token ids [N], in place."""
    model.train().to(settings.device)
    steps = int(settings.epochs * ((len(stream) - CONTEXT) // (CONTEXT * settings.batch)))
    optimizer, scheduler = _optimizer(model, settings, steps)
    with _progress() as progress:
        task = progress.add_task("loss  -  ", total=steps)
        for step, batch in enumerate(itertools.islice(_batches(stream, settings), steps)):
            batch = batch.to(settings.device)
            with torch.autocast(settings.device, torch.bfloat16, enabled=settings.autocast):
                loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                progress.update(task, completed=step, description=f"loss {loss.item():.3f}")
                if not progress.console.is_terminal and step % 200 == 0:
                    print(f"step {step}/{steps} loss {loss.item():.3f}", flush=True)
        progress.update(task, completed=steps)
    model.eval().cpu()


def _optimizer(
    model: PreTrainedModel, settings: Settings, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW, decay on matrices alone; linear warm-up, then a cosine down to 2% of the rate."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )

    def rate(step: int) -> float:
        warm = min(1.0, (step + 1) / settings.warmup)
        return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


def _batches(stream: torch.Tensor, settings: Settings) -> Iterator[torch.Tensor]:
    """Windows [batch, CONTEXT] without end: each epoch shuffled, from an offset of its own."""
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        if len(order) < settings.batch:
            offset = int(torch.randint(CONTEXT, (), generator=generator))
            count = (len(stream) - offset) // CONTEXT
            order = offset + CONTEXT * torch.randperm(count, generator=generator)
        starts, order = order[: settings.batch], order[settings.batch :]
        yield torch.stack([stream[s : s + CONTEXT] for s in starts])


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )


def main() -> None:
    """Train one of the models, or both, and write their folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("architecture", nargs="?", choices=ARCHITECTURES, help="default: both")
    parser.add_argument("--output", type=Path, default=DATA, help="default: the bundled folders")
    parser.add_argument("--epochs", type=float, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for architecture in [options.architecture] if options.architecture else ARCHITECTURES:
        settings = Settings(
            architecture, epochs=options.epochs, seed=options.seed, device=options.device
        )
        facts = run(settings, options.output / architecture)
        print(json.dumps(facts, indent=2))


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    """Train one model and write its folder; the facts of training.json."""
    texts = documents("train")
    tokenizer = train_tokenizer(texts)
    stream = token_stream(texts, tokenizer)
    heldout = token_stream(documents("heldout"), tokenizer)
    torch.manual_seed(settings.seed)
    model = build(settings.architecture)
    started = time.monotonic()
    train(model, stream, settings)
    facts = {
        **asdict(settings),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(stream),
        "heldout_tokens": len(heldout),
        "seconds": round(time.monotonic() - started),
        "unigram_perplexity": unigram_perplexity(stream, heldout, VOCABULARY),
    }
    model = model.half().float()
    facts["heldout_perplexity"] = heldout_perplexity(model, windows(heldout, CONTEXT))
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    model.half().save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=CONTEXT,
    ).save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    return facts


if __name__ == "__main__":
    main()
