"""Accuracy against sparsity: every preset, and the default with one ingredient off at a time.

    python -m benchmarks.accuracy --assets FOLDER --output benchmarks/results/accuracy.json

Calibration and evaluation text are kept apart (benchmarks/accuracy_cases.py); `other` is text of
another domain. Every method runs at the sparsity that uniform ratios (fasp) really reach: equal
budgets. Rows of an earlier run in the output file are kept; with `--missing` only those that are
not there yet are measured.
excess = log(perplexity / dense perplexity); for a classifier, accuracy lost.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fasp_graph import Config
from fasp_graph.decide import decide
from passes.analysis import analysis
from passes.capture import capture
from passes.rewrite import attribute, removal, rewrite
from passes.select import allocate

from .accuracy_cases import CASES, Case

PRESETS: dict[str, dict[str, Any]] = {
    name: {"method": name}
    for name in ("fasp", "best", "slimgpt", "modegpt", "flap", "wanda", "magnitude")
}
ABLATION: dict[str, dict[str, Any]] = {
    "fasp": {"method": "fasp"},
    "best": {},
    "allocation=curves": {"allocation": "curves"},
    "allocation=uniform": {"allocation": "uniform"},
    "score=obs": {"score": "obs"},
    "score=fasp": {"score": "fasp"},
    "allocation=influence": {"allocation": "influence", "restore": "residual"},
    "score=taylor": {"score": "taylor"},
    "score=numerical": {"score": "numerical"},
    "restore=residual": {"restore": "residual"},
    "restore=affine": {"restore": "affine"},
    "restore=asymmetric": {"restore": "asymmetric"},
    "restore=none": {"restore": "none"},
    "ridge=1e-3": {"ridge": 1e-3},
    "ridge=held-out": {"ridge": "held-out"},
}


@dataclass(frozen=True)
class Row:
    """One pruned model. `scores`: text or data set -> perplexity or accuracy."""

    model: str
    table: str
    variant: str
    asked: float
    sparsity: float
    seed: int
    scores: dict[str, float]
    dense: dict[str, float]
    excess: dict[str, float]
    forward_passes: float
    seconds: float


def rows_of(
    case: Case, options: argparse.Namespace, seed: int, done: set[tuple[Any, ...]]
) -> Iterator[Row]:
    """All rows of one model."""
    captured = capture(case.model, case.inputs)
    deps = analysis(captured.graph_module, captured.inputs)
    groups = [group for group in deps.groups if group.kind == "chain"]
    dense = case.measure(captured.graph_module)
    table = "ablation" if options.ablation else "presets"
    for asked in options.sparsity:
        target = allocate(deps, groups, asked).sparsity
        for variant, given in (ABLATION if options.ablation else PRESETS).items():
            if variant not in (options.variants or [variant]):
                continue
            if (case.name, table, variant, asked, seed) in done:
                continue
            config = Config(**{"sparsity": target, "seed": seed, **given})
            started = time.perf_counter()
            decided = decide(captured, deps, groups, case.calibration(seed), config)
            seconds = time.perf_counter() - started
            repaired = rewrite(captured.graph_module, removal(deps, {}))
            with torch.no_grad():
                for name, weight in decided.weights.items():
                    attribute(repaired, name).copy_(weight)
            scores = case.measure(rewrite(repaired, removal(deps, decided.kept)))
            reached = decided.budget.sparsity
            yield Row(
                *(case.name, table, variant, asked, reached, seed, scores, dense),
                {key: case.excess(dense[key], scores[key]) for key in dense},
                decided.forward_passes,
                round(seconds, 2),
            )


def key(row: Row) -> tuple[Any, ...]:
    """What a row is about; a second measurement replaces the first."""
    return row.model, row.table, row.variant, row.asked, row.seed


def read(path: Path) -> list[Row]:
    """The rows of an earlier run."""
    return [Row(**held) for held in json.loads(path.read_text())] if path.is_file() else []


def show(rows: list[Row], console: Console) -> None:
    """excess of every variant, and in brackets its share of fasp's."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    table = Table("model", "removed", "data", "dense", *variants)
    for model, asked in dict.fromkeys((row.model, row.asked) for row in rows):
        here = [row for row in rows if (row.model, row.asked) == (model, asked)]
        for data in here[0].dense:
            mean = {
                v: sum(found) / len(found)
                for v in variants
                if (found := [row.excess[data] for row in here if row.variant == v])
            }
            base = mean.get("fasp", float("nan"))
            cells = [f"{x:.3f} ({x / base:.2f})" if base else f"{x:.3f}" for x in mean.values()]
            table.add_row(model, f"{asked:.0%}", data, f"{here[0].dense[data]:.3g}", *cells)
    console.print(table)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--assets", type=Path)
    parser.add_argument("--models", nargs="+", default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("build/accuracy.json"))
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--variants", nargs="+", help="default: all of the table")
    parser.add_argument("--ablation", action="store_true")
    parser.add_argument("--missing", action="store_true", help="leave out what the file has")
    options = parser.parse_args()
    console, rows = Console(width=150), read(options.output)
    for name in options.models:
        case = CASES[name](options.assets)
        if case is None:
            console.print(f"{name} left out: its files are not here")
            continue
        for seed in options.seeds:
            done = {key(row) for row in rows} if options.missing else set()
            for row in rows_of(case, options, seed, done):
                print(row.model, row.variant, row.asked, row.scores, flush=True)
                rows = [r for r in rows if key(r) != key(row)] + [row]
                options.output.parent.mkdir(parents=True, exist_ok=True)
                found = json.dumps([asdict(r) for r in rows], indent=1)
                options.output.write_text(found + "\n")
    show(rows, console)


if __name__ == "__main__":
    main()
