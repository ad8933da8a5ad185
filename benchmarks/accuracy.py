"""Accuracy against sparsity on real trained models.

    python benchmarks/accuracy.py --assets ../shared/assets

Calibration and evaluation text are kept apart (WikiText-2 train and test; the two halves of the
stories; the bundled models' calibration and held-out modules). Prints a table, writes JSON.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

import fasp_graph as fg
import models_zoo
from models_zoo.text import windows

VARIANTS = {
    "fasp": {"method": "fasp"},
    "affine": {"method": "fasp", "restore": "affine"},
    "flap": {"method": "flap"},
    "no repair": {"method": "wanda"},
    "magnitude": {"method": "magnitude"},
}
TEXTS = {
    "stories260K-hf": ("text/tinystories.txt", "text/tinystories.txt", 512),
    "opt-wikitext-hf": ("text/wikitext2-train.txt", "text/wikitext2-test.txt", 256),
}


def tokens(tokenizer, text, length, count):
    import torch

    return windows(torch.tensor(tokenizer(text)["input_ids"]), length, count)


def from_assets(root: Path, name: str):
    calibration, heldout, length = TEXTS[name]
    model = AutoModelForCausalLM.from_pretrained(root / name).float().eval()
    tokenizer = AutoTokenizer.from_pretrained(root / name)
    first, second = ((root / path).read_text() for path in (calibration, heldout))
    if calibration == heldout:
        first, second = first[: len(first) // 2], second[len(second) // 2 :]
    rows = tokens(tokenizer, first, length, 32768 // length)
    batches = [{"input_ids": r} for r in rows.split(16)]
    return (
        model,
        {"input_ids": rows[:3, :17].clone()},
        batches,
        tokens(tokenizer, second, length, 96),
    )


def cases(assets: Path | None):
    for name in ("llama", "opt"):
        entry = models_zoo.load(name)
        yield f"zoo:{name}", (entry.model, entry.inputs, entry.calibration, entry.heldout)
    if assets and assets.is_dir():
        for name in TEXTS:
            yield name, from_assets(assets, name)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--output", type=Path, default=Path("build/accuracy.json"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.2, 0.3])
    options = parser.parse_args()
    rows = []
    for name, (model, inputs, calibration, heldout) in cases(options.assets):
        dense = fg.perplexity(model, heldout)
        runs = [(s, v) for s in options.sparsity for v in VARIANTS]
        for sparsity, variant in track(runs, description=name):
            config = fg.Config(sparsity=sparsity, **VARIANTS[variant])
            small = fg.prune(model, inputs, calibration, config)
            rows.append(
                {
                    "model": name,
                    "variant": variant,
                    "sparsity": small.report.sparsity,
                    "asked": sparsity,
                    "dense": dense,
                    "perplexity": fg.perplexity(small.model, heldout),
                    "verify_max_error": small.report.verify_max_error,
                }
            )
    table = Table("model", "removed", "dense", *VARIANTS)
    for key in dict.fromkeys((r["model"], r["asked"], r["dense"]) for r in rows):
        found = {r["variant"]: r["perplexity"] for r in rows if (r["model"], r["asked"]) == key[:2]}
        cells = [f"{found[v]:.2f}" for v in VARIANTS]
        table.add_row(key[0], f"{key[1]:.0%}", f"{key[2]:.2f}", *cells)
    Console(width=110).print(table)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
