"""What a budget in measured time buys over one in parameters, at the same time.

    python -m benchmarks.budgets --assets FOLDER --output benchmarks/results/budgets.json

A model is pruned with a budget in parameters, and again with one in time (fasp_graph/pricing.py)
that asks for as large a share of the layers' time as the first plan removes of it. Both keep
multiples of `align`. Then dense and both compact graphs run one calibration batch in turn.

    time     removed share of the time of the layers in scope, by the cost model
    speedup  median over rounds of dense / compact seconds of the whole graph, and its range
    excess   log(perplexity / dense perplexity); of a classifier accuracy lost
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.fx import GraphModule

from fasp_graph import Config, Pruned, prune
from fasp_graph.pricing import measured_cost
from fasp_graph.prune import Program, read
from fasp_graph.timing import rounds, speedup
from passes.capture import as_args

from .accuracy_cases import CASES, Case


def times(case: Case, graphs: dict[str, GraphModule], runs: int) -> dict[str, list[float]]:
    """Processor seconds of every graph in every round, at the first calibration batch."""
    args, kwargs = as_args(case.calibration(0)[0])
    calls = {name: lambda g=graph: g(*args, **kwargs) for name, graph in graphs.items()}
    return rounds(calls, runs, clock=time.process_time)


def removed(case: Case, program: Program, pruned: Pruned, config: Config) -> float:
    """The share of the layers' time that a plan removes, by the cost model."""
    groups = [program.deps[name] for name in pruned.plan.kept]
    batch = as_args(case.calibration(0)[0])
    cost = measured_cost(program.captured, program.deps, groups, [batch], config)
    keep = {g.name: len(pruned.plan.kept[g.name]) // g.blocks for g in groups}
    return cost.removed(keep)


def rows_of(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Two rows for each share: budget in parameters, budget in time."""
    program = read(case.model, case.inputs)
    dense = program.captured.graph_module
    before = case.measure(dense)
    for asked in options.sparsity:
        found: dict[str, Pruned] = {}
        config = Config(asked, align=options.align)
        for budget in ("parameters", "latency"):
            data = case.calibration(0)
            found[budget] = prune(case.model, case.inputs, data, config, program=program)
            share = removed(case, program, found["parameters"], config)
            config = Config(share, align=options.align, budget="latency")
        graphs = {"dense": dense, **{name: held.graph_module for name, held in found.items()}}
        seconds = times(case, graphs, options.runs)
        for budget, pruned in found.items():
            scores = case.measure(pruned.graph_module)
            yield {
                "model": case.name,
                "asked": asked,
                "budget": budget,
                "sparsity": pruned.report.sparsity,
                "time": removed(case, program, pruned, config),
                "speedup": speedup(seconds["dense"], seconds[budget]),
                "scores": scores,
                "dense": before,
                "excess": {key: case.excess(before[key], scores[key]) for key in before},
            }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A line for each row."""
    table = Table("model", "asked", "budget", "parameters", "time", "speedup", "excess")
    for row in rows:
        middle, low, high = row["speedup"]
        lost = ", ".join(f"{key} {value:.4f}" for key, value in row["excess"].items())
        cells = (
            f"{row['sparsity']:.1%}",
            f"{row['time']:.1%}",
            f"{middle:.3f} ({low:.3f}-{high:.3f})",
        )
        table.add_row(row["model"], f"{row['asked']:.0%}", row["budget"], *cells, lost)
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--models", nargs="+", default=["zoo:llama", "zoo:opt", "resnet20"])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--align", type=int, default=8)
    parser.add_argument("--runs", type=int, default=25)
    parser.add_argument("--output", type=Path, default=Path("build/budgets.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        case = CASES[name](options.assets)
        if case is None:
            print(f"{name} left out: its files are not here")
            continue
        for row in rows_of(case, options):
            rows.append(row)
            print(json.dumps(row), flush=True)
    settings = {"threads": 1, "align": options.align, "runs": options.runs}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")
    show(rows, Console(width=150))


if __name__ == "__main__":
    main()
