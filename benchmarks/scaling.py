"""How the walk's time grows with layers, tokens and width: fitted exponents.

    time ~ x^a: a is the slope of log time over log x by least squares, CPU seconds of one thread

Time should be linear in layers and tokens (a <= 1.05), and between quadratic and cubic in width,
as matrix products and solves are.

    python -m benchmarks.scaling [--hidden 256] [--output benchmarks/results/scaling.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import OPTConfig, OPTForCausalLM

from benchmarks.plots import lines
from benchmarks.speed import calibration
from fasp_graph import Config, prune

CASES = ("layers", "tokens", "hidden")
WINDOWS = (4, 256)  # of a batch: their number and length


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of log y over log x by least squares."""
    x, y = ([math.log(v) for v in vs] for vs in (xs, ys))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def measure(layers: int, batches: int, hidden: int) -> dict[str, float]:
    """The walk of one OPT-shaped model with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "word_embed_proj_dim": hidden, "ffn_dim": 4 * hidden}
    config = OPTConfig(
        **sizes, num_hidden_layers=layers, num_attention_heads=hidden // 64, vocab_size=512
    )
    model, data = OPTForCausalLM(config).eval(), calibration(batches, *WINDOWS)
    ticks: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "prune":
            ticks.append(time.process_time())

    example = {"input_ids": data[0]["input_ids"][:2, :17]}
    prune(model, example, data, Config(sparsity=0.3, method="fasp"), progress)
    row = {"layers": layers, "tokens": batches * math.prod(WINDOWS), "hidden": hidden}
    return row | {"seconds": ticks[-1] - ticks[0]}


def main() -> None:
    """Measure; write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/scaling.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    width = options.hidden
    measure(1, 1, width)  # warm
    cases = {
        "layers": [(n, 2, width) for n in (1, 2, 4)],
        "tokens": [(1, n, width) for n in (2, 4, 8)],
        "hidden": [(1, 2, n * width) for n in (1, 2, 3)],
    }
    found: dict[str, Any] = {}
    for name, held in cases.items():
        rows = [measure(*case) for case in held]
        xs = [row[name] for row in rows]
        fit = exponent(xs, [row["seconds"] for row in rows])
        found[name] = {"rows": rows, "exponent": fit}
        print(f"{name}: time ~ {name}^{fit:.2f}", flush=True)
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    series = {
        n: [(r[n] / found[n]["rows"][0][n], r["seconds"]) for r in found[n]["rows"]] for n in CASES
    }
    lines(
        options.output.with_suffix(".svg"),
        "Time of the walk",
        "times the smallest case",
        "CPU seconds",
        series,
    )


if __name__ == "__main__":
    main()
