"""Time of a walk in several processes against one, by the clock, one thread each.

speed-up = seconds of one process / seconds of `--ranks` processes, the same batches in all

python -m benchmarks.ranks [--output benchmarks/results/ranks.json]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

METHODS = ("fasp", "best")
WORKER = """
import json, sys, torch
torch.set_num_threads(1)
from benchmarks.speed import SHAPES, calibration
from fasp_graph import Config, prune
from fasp_graph.scale.distributed import joined, world
name, method, layers, windows = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
torch.manual_seed(0)
model, data = SHAPES[name](layers), calibration(windows)
with joined():
    pruned = prune(model, {"input_ids": torch.arange(34).view(2, 17)}, data, Config(method=method))
    if world()[0] == 0:
        print(json.dumps(pruned.report.seconds))
"""


def seconds(ranks: int, *given: str) -> dict[str, float]:
    """Seconds of each stage, in the first of `ranks` processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    own = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(ranks):
        told = {**os.environ, **own, "RANK": str(rank)}
        command = [sys.executable, "-W", "ignore", "-c", WORKER, *given]
        started.append(subprocess.Popen(command, env=told, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise SystemExit("a process failed")
    return json.loads(said[0])  # type: ignore[no-any-return]


def measure(shape: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    given = (shape, method, str(options.layers), str(options.windows))
    alone, together = seconds(1, *given)["prune"], seconds(options.ranks, *given)["prune"]
    row = {"shape": shape, "method": method, "ranks": options.ranks, "layers": options.layers}
    figures = {"one": alone, "several": together, "speed_up": alone / together}
    return {**row, "windows": options.windows, **figures}


def main() -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("layers", 2), ("windows", 16), ("ranks", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/ranks.json"))
    options = parser.parse_args()
    rows = [measure("opt-125m", method, options) for method in METHODS]
    options.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
