"""ONNX files of trained models: what float16 and int8 cost in perplexity; a file over 2 GB.

perplexity    of the model, dense and pruned, in torch and of each form of its file in ONNX Runtime,
              on the same held-out windows
large         a random model whose weights do not fit in one protobuf: written, checked, compared

    python -m benchmarks.onnx_forms zoo:llama zoo:opt [FOLDER:TEXT] [--large] [--docs]

Figures go to benchmarks/results/onnx.json; --docs writes the table of docs/deploy.md from them.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn

from fasp_graph import Config, export, perplexity, prune
from fasp_graph.data import load_target
from fasp_graph.evaluate import spread
from fasp_graph.exports.export import Options, export_source, source_of
from fasp_graph.exports.onnx_reduce import DTYPES
from fasp_graph.targets import Target

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "deploy.md", ROOT / "benchmarks" / "results" / "onnx.json"
MARKS = ("<!-- onnx forms -->", "<!-- end of onnx forms -->")
SPARSITY, WINDOWS, LENGTH = 0.3, 16, 256
BATCHES = 4  # of calibration: what a form costs is asked, not what pruning does
WIDTH = 24_000  # squared, times 4 bytes: 2.3 GB


def measured(text: str) -> dict[str, Any]:
    """Perplexity and bytes of a target (zoo:NAME, or FOLDER:TEXT with the text to read)."""
    target = _target(text)
    assert target.heldout is not None
    tokens = spread(target.heldout, WINDOWS)
    config = Config(SPARSITY, method="fasp")
    pruned = prune(target.model, target.inputs, target.calibration[:BATCHES], config)
    row: dict[str, Any] = {
        "method": config.method,
        "sparsity": round(pruned.report.sparsity, 4),
        "tokens": tokens.numel(),
        "dense": perplexity(target.model, tokens),
        "pruned": perplexity(pruned.model, tokens),
    }
    with tempfile.TemporaryDirectory() as folder:
        for dtype in DTYPES:
            path = Path(folder, f"{dtype}.onnx")
            found = export(pruned, path, dtype=dtype, tokens=tokens)
            row[dtype] = {"perplexity": found.perplexity, "bytes": found.bytes}
    return row


def _target(text: str) -> Target:
    folder, _, data = text.rpartition(":")
    if Path(folder).is_dir():
        return load_target(folder, data, LENGTH, WINDOWS, data)
    return load_target(text)


def large() -> dict[str, Any]:
    """One matrix of more than 2 GB, through the command's own path; MB are 10^6 bytes."""
    torch.manual_seed(0)
    layers = nn.Linear(16, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 8)).eval()
    inputs = torch.randn(3, 16)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Target("wide", model, inputs)
        found = export_source(source_of(target), Path(folder, "m.onnx"), "onnx", Options())
        onnx.checker.check_model(found.path)
        sizes = {name: Path(folder, name).stat().st_size for name in found.files}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "files": sizes,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_mb": peak // 10**6,
    }


def table(found: dict[str, Any]) -> str:
    """The rows of docs/deploy.md."""
    heads = ("model", "dense", "pruned", *(f"{dtype}, MB" for dtype in DTYPES))
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in found["perplexity"].items():
        forms = (f"{row[d]['perplexity']:.3f}, {row[d]['bytes'] / 1e6:.1f}" for d in DTYPES)
        lines.append(f"| {name} | {row['dense']:.3f} | {row['pruned']:.3f} | {' | '.join(forms)} |")
    return "\n".join(lines)


def page(text: str, found: dict[str, Any]) -> str:
    """docs/deploy.md with the table between its marks."""
    before, rest = text.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    return f"{before}{MARKS[0]}\n\n{table(found)}\n\n{MARKS[1]}{after}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="zoo:NAME, or FOLDER:TEXT")
    parser.add_argument("--large", action="store_true", help="measure a file of more than 2 GB")
    parser.add_argument("--docs", action="store_true", help="write the table of docs/deploy.md")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    path: Path = options.output
    found = json.loads(path.read_text("utf-8")) if path.exists() else {"perplexity": {}}
    for text in options.models:
        name = Path(text.rpartition(":")[0]).name if "/" in text else text
        found["perplexity"][name] = measured(text)
        print(name, json.dumps(found["perplexity"][name]), flush=True)
    if options.large:
        found["large"] = large()
        print(json.dumps(found["large"]), flush=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.docs:
        PAGE.write_text(page(PAGE.read_text("utf-8"), found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
