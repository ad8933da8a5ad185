"""Are compact models faster? Latency of prefill and of decode with cache, dense against compact.

    speed-up   median CPU time of dense / of compact on one thread, runs alternating
    ideal      FLOPs of dense / of compact
    reached    speed-up / ideal

Random weights in the shapes of OPT-125M and LLaMA-160M (vocabulary cut: the output head is not
pruned and would hide the layers). `graph` is the captured graph, `class` the user's own model.

    python -m benchmarks.latency [--layers 12] [--align 8] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache

from benchmarks.plots import bars
from benchmarks.speed import SHAPES
from benchmarks.speed import seconds as cpu_seconds
from fasp_graph import Config, Pruned, prune
from fasp_graph.evaluate import flops
from fasp_graph.exports.onnx import onnx_session, run_session, write_graph
from passes.capture import Captured, capture
from passes.kernels import narrow

LENGTH = 128
BATCHES = (1, 16)
Call = Callable[[], Any]


def tokens(batch: int, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, 512, (batch, length), generator=generator)}


def prefill(module: nn.Module, batch: int) -> Call:
    """One forward pass over all tokens."""
    inputs = tokens(batch)
    return lambda: module(**inputs)


def decode(model: nn.Module, batch: int) -> Call:
    """One more token after LENGTH cached ones; the cache is cut back after each call."""
    cache = DynamicCache()
    model(**tokens(batch), past_key_values=cache, use_cache=True)
    one = {"input_ids": tokens(batch)["input_ids"][:, :1]}

    def call() -> Any:
        result = model(**one, past_key_values=cache, use_cache=True)
        cache.crop(-1)
        return result

    return call


def alternating(calls: dict[str, Call], runs: int) -> dict[str, float]:
    """Median CPU seconds of a call; other processes on the machine hardly show in them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in (*calls.values(), *calls.values()):
        call()
    for _ in range(runs):
        for name, call in calls.items():
            times[name].append(cpu_seconds(call))
    return {name: statistics.median(found) for name, found in times.items()}


def runtimes(dense: Captured, model: nn.Module, pruned: Pruned, folder: Path) -> dict[str, Any]:
    """Runtime -> (dense, compact), each batch -> call."""
    found: dict[str, Any] = {
        "prefill class": [lambda b, m=m: prefill(m, b) for m in (model, pruned.model)],
        "decode class": [lambda b, m=m: decode(m, b) for m in (model, pruned.model)],
    }
    graphs = (dense.graph_module, pruned.graph_module)
    found["prefill graph"] = [lambda b, g=g: prefill(g, b) for g in graphs]
    if shutil.which("g++"):
        compiled = [torch.compile(graph, dynamic=False) for graph in graphs]
        found["prefill compile"] = [lambda b, g=g: prefill(g, b) for g in compiled]
    sessions = []
    for number, graph in enumerate(graphs):
        path = folder / f"{number}.onnx"
        write_graph(narrow(graph), dense.inputs, dense.dynamic_shapes, path)
        sessions.append(onnx_session(path))
    found["prefill onnx"] = [
        lambda b, s=s: lambda: run_session(s, ((), tokens(b))) for s in sessions
    ]
    return found


@torch.no_grad()
def measure(name: str, layers: int, sparsity: float, align: int, runs: int) -> list[dict[str, Any]]:
    """All rows of one shape."""
    torch.manual_seed(0)
    model = SHAPES[name](layers)
    example = tokens(2, 17)
    dense = capture(model, example)
    pruned = prune(model, example, None, Config(sparsity, "magnitude", align=align))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for runtime, (one, other) in runtimes(dense, model, pruned, Path(folder)).items():
            for batch in BATCHES:
                inputs = tokens(batch, 1 if "decode" in runtime else LENGTH)
                work = [flops(g, (), inputs) for g in (dense.graph_module, pruned.graph_module)]
                seconds = alternating({"dense": one(batch), "compact": other(batch)}, runs)
                speedup, ideal = seconds["dense"] / seconds["compact"], work[0] / work[1]
                row = {"shape": name, "runtime": runtime, "batch": batch, **seconds}
                row |= {"speedup": speedup, "ideal": ideal, "reached": speedup / ideal}
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def main() -> None:
    """Measure; write JSON and a plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 12), ("align", 1), ("runs", 15)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--sparsity", type=float, default=0.3)
    parser.add_argument("--shape", choices=list(SHAPES), action="append")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/latency.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in options.shape or SHAPES:
        rows += measure(name, options.layers, options.sparsity, options.align, options.runs)
    settings = {k: getattr(options, k) for k in ("layers", "align", "runs", "sparsity")}
    options.output.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")
    labels = [f"{row['shape']} {row['runtime']} x{row['batch']}" for row in rows]
    bars(
        options.output.with_suffix(".svg"),
        f"Share of the ideal speed-up at {options.sparsity:.0%} sparsity",
        labels,
        [row["reached"] for row in rows],
        mark=0.9,
    )


if __name__ == "__main__":
    main()
