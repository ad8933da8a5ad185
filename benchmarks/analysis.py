"""Time and memory of the analysis against the number of layers; no weights exist.

    python -m benchmarks.analysis [--layers 2,4,8,16] [--full] [--output build/analysis.json]

Full-width configurations of LLaMA-3-70B and DeepSeek-V3. Each point is a process of its own:
seconds of CPU and of the clock for building, capture, coupling and the rehearsal of a rewrite, and
the peak of its memory.
The exponent e is fitted to seconds = a * layers^e over the points. --full adds full depth.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.plots import lines

DEPTH = {"llama-70b": 80, "deepseek-v3": 61}
STAGES = ("build", "capture", "couple", "rehearse")


def config(name: str, layers: int) -> Any:
    """Full width, `layers` deep."""
    from transformers import DeepseekV3Config, LlamaConfig

    if name == "deepseek-v3":
        return DeepseekV3Config(num_hidden_layers=layers)
    return LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def measure(name: str, layers: int) -> dict[str, Any]:
    """One point, in this process."""
    import torch

    from fasp_graph.scale.skeleton import from_config
    from passes.analysis import analysis
    from passes.capture import capture
    from passes.rehearsal import rehearsed

    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": name, "layers": layers}
    with _timed(row, "build"):
        model = from_config(config(name, layers))
    row["parameters"] = sum(p.numel() for p in model.parameters())
    with _timed(row, "capture"):
        program = capture(model, {"input_ids": torch.randint(3, 100, (3, 11))})
    row["nodes"] = len(program.graph_module.graph.nodes)
    with _timed(row, "couple"):
        deps = analysis(program.graph_module, program.inputs)
    with _timed(row, "rehearse"):
        deps = rehearsed(program.graph_module, program.inputs, deps)
    row["groups"] = {
        k: sum(g.kind == k for g in deps.groups) for k in {g.kind for g in deps.groups}
    }
    row["gigabytes"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


@contextmanager
def _timed(row: dict[str, Any], stage: str) -> Iterator[None]:
    wall, cpu = time.monotonic(), time.process_time()
    yield
    row[f"{stage}_seconds"] = round(time.monotonic() - wall, 2)
    row[f"{stage}_cpu"] = round(time.process_time() - cpu, 2)


def total(row: dict[str, Any]) -> float:
    """Seconds of CPU of all stages."""
    return sum(row[f"{stage}_cpu"] for stage in STAGES)


def exponent(rows: list[dict[str, Any]]) -> float:
    """e of seconds = a * layers^e by least squares in the logarithms."""
    layers, seconds = ([f(row) for row in rows] for f in (lambda r: r["layers"], total))
    return round(float(np.polyfit(np.log(layers), np.log(seconds), 1)[0]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", default="2,4,8,16", help="depths that are timed")
    parser.add_argument("--models", default=",".join(DEPTH), help="which of these families")
    parser.add_argument("--full", action="store_true", help="the depth of the real models as well")
    parser.add_argument("--output", type=Path, default=Path("build/analysis.json"))
    options = parser.parse_args()
    chosen = [int(text) for text in options.layers.split(",")]
    points = [
        (name, layers)
        for name in options.models.split(",")
        for layers in chosen + ([DEPTH[name]] if options.full else [])
    ]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, point) for point in track(points, description="analysis")]
    fits = {n: exponent([r for r in rows if r["model"] == n]) for n in options.models.split(",")}
    Console(width=130).print(table(rows))
    Console().print(f"exponents: {fits}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({"rows": rows, "exponents": fits}, indent=2) + "\n")
    draw(options.output.with_suffix(".svg"), rows)


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """A line per model."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        series.setdefault(row["model"], []).append((row["layers"], total(row)))
    lines(path, "Analysis from a configuration", "layers", "CPU seconds", series)


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per point."""
    result = Table(
        "model", "layers", "parameters", "nodes", *(f"{s} s" for s in STAGES), "CPU s", "GB"
    )
    for row in rows:
        result.add_row(
            row["model"],
            str(row["layers"]),
            f"{row['parameters'] / 1e9:.1f}B",
            str(row["nodes"]),
            *(f"{row[f'{stage}_seconds']:.1f}" for stage in STAGES),
            f"{total(row):.1f}",
            f"{row['gigabytes']:.2f}",
        )
    return result


if __name__ == "__main__":
    main()
