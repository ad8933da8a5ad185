"""Time of pruning against a plain forward pass and a plain two-pass FASP, in CPU seconds.

    multiple = (prune - gram and solve FLOPs / matmul rate) / forward

`prune` is the walk; capture, verify and emit do not depend on the calibration tokens and are
listed apart. Layers are as wide as OPT-125M's and LLaMA-160M's, windows as long as in the paper
(2,048 tokens); depth, vocabulary and the number of windows are cut so that a run takes minutes:
time is linear in layers and tokens (benchmarks/scaling.py). CPU seconds of the process, not wall
time: a busy machine does not show. A small prune comes first, so that no import is counted.

    python -m benchmarks.speed [--output benchmarks/results/speed.json]
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from benchmarks.two_pass import two_pass
from fasp_graph import Config, Pruned, prune

SPARSITY = 0.3
LENGTH = 2048


def opt(layers: int) -> nn.Module:
    """OPT-125M's layers."""
    sizes = {"hidden_size": 768, "ffn_dim": 3072, "num_attention_heads": 12}
    config = OPTConfig(num_hidden_layers=layers, vocab_size=512, word_embed_proj_dim=768, **sizes)
    return OPTForCausalLM(config).eval()


def llama(layers: int) -> nn.Module:
    """LLaMA-160M's layers."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    config = LlamaConfig(num_hidden_layers=layers, vocab_size=512, **sizes)
    return LlamaForCausalLM(config).eval()


SHAPES: dict[str, Callable[[int], nn.Module]] = {"opt-125m": opt, "llama-160m": llama}


def seconds(call: Callable[[], Any]) -> float:
    """CPU seconds of one call."""
    started = time.process_time()
    call()
    return time.process_time() - started


def rates() -> dict[str, float]:
    """FLOPs per second of a matrix product: of tokens by width in float32, of widths in float64."""
    found = {}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        left, right = torch.randn(2048, 3072, dtype=dtype), torch.randn(3072, 768, dtype=dtype)
        best = min(seconds(lambda a=left, b=right: a @ b) for _ in range(4))
        found[name] = 2 * 2048 * 3072 * 768 / best
    return found


def counted(pruned: Pruned, tokens: int) -> dict[str, float]:
    """FLOPs of Gram matrices (half of X^T X) and total power and W_P G in float32; of the
    solves in float64: Cholesky, two triangular solves.
    """
    work = {"float32": 0.0, "float64": 0.0}
    for group in pruned.deps.groups:
        kept = pruned.plan.kept.get(group.name)
        if kept is None:
            continue
        shape = pruned.deps.parameters[group.consumers[0].parameter]
        out, width = shape[0], shape[1]
        keep = round(width * len(kept) / group.size)
        work["float32"] += tokens * width**2 + 2 * out * width * (2 * width - keep)
        work["float64"] += keep**3 / 3 + 2 * out * keep**2
    return work


def _clock(ticks: dict[str, list[float]]) -> Callable[[str, int, int], None]:
    """Progress that notes CPU time: the walk lies between its first node (an embedding or a
    constant) and its last.
    """

    def tick(stage: str, done: int, total: int) -> None:
        ticks.setdefault(stage, []).append(time.process_time())

    return tick


def calibration(batches: int, windows: int = 1, length: int = LENGTH) -> list[dict[str, Tensor]]:
    """Batches of windows of random tokens."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 512, (windows, length), generator=generator)}
        for _ in range(batches)
    ]


@torch.no_grad()
def measure(name: str, layers: int, windows: int, reference: bool = True) -> dict[str, Any]:
    """One row of the table."""
    torch.manual_seed(0)
    model, data = SHAPES[name](layers), calibration(windows)
    tokens = windows * LENGTH
    example = {"input_ids": torch.randint(0, 512, (2, 17))}
    prune(SHAPES[name](1), example, calibration(1, 1, 17), Config(sparsity=SPARSITY, method="fasp"))
    model(**data[0])
    forward = min(seconds(lambda: [model(**b, use_cache=False) for b in data]) for _ in range(2))
    ticks: dict[str, list[float]] = {}
    config = Config(sparsity=SPARSITY, method="fasp")
    started = time.process_time()
    pruned = prune(model, example, data, config, _clock(ticks))
    whole = time.process_time() - started
    work, rate = counted(pruned, tokens), rates()
    floor = sum(work[k] / rate[k] for k in work)
    walk = ticks["prune"][-1] - ticks["prune"][0]
    row = {
        "shape": name,
        "layers": layers,
        "tokens": tokens,
        "forward": forward,
        "prune": walk,
        "counted": floor,
        "multiple": (walk - floor) / forward,
        "whole": whole,
        "stages_wall": pruned.report.seconds,
    }
    if reference:
        layered = copy.deepcopy(model)
        stack = layered.model.decoder.layers if name == "opt-125m" else layered.model.layers
        row["two_pass"] = seconds(lambda: two_pass(layered, stack, data, pruned.plan.ratio))
        row["faster"] = row["two_pass"] / walk
    return row


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(name, options.layers, options.windows) for name in SHAPES]
    settings = {"sparsity": SPARSITY, "window": LENGTH, "threads": torch.get_num_threads()}
    found: dict[str, Any] = {**settings, "rates": rates(), "rows": rows}
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
