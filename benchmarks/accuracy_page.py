"""The tables and the plot of docs/accuracy.md, from the JSON of benchmarks/accuracy.py.

    python -m benchmarks.accuracy_page benchmarks/results/accuracy.json docs/accuracy.md

What stands between `<!-- TABLE: begin -->` and `<!-- TABLE: end -->` is replaced, for the tables of
`TABLES`; the plot goes beside the page. More JSON files are merged into the first one. A line is
shown where all its columns were measured: a table has no empty cells.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from .accuracy import ABLATION, PRESETS, Row, key, read

SHORT = ("fasp", "best", "magnitude")
# mark in the page -> rows, columns, whether on the calibration's own domain
TABLES = {
    "short": ("presets", SHORT, True),
    "presets": ("presets", tuple(PRESETS), True),
    "other": ("presets", SHORT, False),
    "ablation": ("ablation", tuple(ABLATION), True),
    "ablation of other text": ("ablation", tuple(ABLATION), False),
}
FIRST = {"accuracy", "heldout"}


def merged(paths: Sequence[Path]) -> list[Row]:
    """Rows of all files; a later file overrules."""
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        found |= {key(row): row for row in read(path)}
    return sorted(found.values(), key=lambda row: (row.table, row.model, row.asked, row.variant))


def cell(rows: list[Row], data: str) -> tuple[float, float, str]:
    """Mean score and excess over seeds, and the text of a cell: both, with the spread of the
    excess.
    """
    scores, losses = ([held[data] for held in part] for part in _columns(rows))
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    return mean(scores), mean(losses), f"{mean(scores):.4g} ({mean(losses):.3f}{spread})"


def _columns(rows: list[Row]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return [row.scores for row in rows], [row.excess for row in rows]


def table(rows: list[Row], variants: Sequence[str], first: bool) -> str:
    """One line for each model and sparsity, a column for each variant; `first`: the calibration's
    own domain, else the other text.
    """
    lines = [f"| model (dense) | removed | {' | '.join(variants)} | best / fasp |"]
    lines.append("|---" * (len(variants) + 3) + "|")
    for model, asked in sorted({(row.model, row.asked) for row in rows}):
        here = [row for row in rows if (row.model, row.asked) == (model, asked)]
        data = next((name for name in here[0].dense if (name in FIRST) == first), None)
        by = {v: [row for row in here if row.variant == v] for v in variants}
        if data is None or not all(by.values()):
            continue
        cells = {v: cell(found, data) for v, found in by.items()}
        least = min(cells, key=lambda v: cells[v][1])
        texts = [f"**{t}**" if v == least else t for v, (_, _, t) in cells.items()]
        lost, base = cells["best"][1], cells["fasp"][1]
        share = f"{lost / base:.2f}" if lost > 0 and base > 0 else "no loss"
        dense = f"{here[0].dense[data]:.4g}"
        lines.append(f"| {model} ({dense}) | {asked:.0%} | {' | '.join(texts)} | {share} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Excess against sparsity, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = sorted({row.model for row in rows})
    columns = min(3, len(models))
    height = -(-len(models) // columns)
    figure, axes = pyplot.subplots(
        height, columns, figsize=(4 * columns, 3 * height), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(models) :]:
        axis.remove()
    for axis, model in zip(axes.flat, models, strict=False):
        for variant in PRESETS:
            here = [row for row in rows if (row.model, row.variant) == (model, variant)]
            asked = sorted({row.asked for row in here})
            data = next((name for row in here for name in row.dense if name in FIRST), None)
            if data is None:
                continue
            losses = [mean(r.excess[data] for r in here if r.asked == x) for x in asked]
            axis.plot([100 * x for x in asked], losses, marker="o", label=variant)
        axis.set(title=model, xlabel="% removed", ylabel="lost", ylim=(0, None))
    axes.flat[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)


def fill(page: str, name: str, content: str) -> str:
    """`page` with the part between the two marks of `name` replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{content}\n{end}{after}"


def main() -> None:
    """Merge, write the tables and the plot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("page", type=Path)
    options = parser.parse_args()
    rows = merged(options.results)
    text = json.dumps([vars(row) for row in rows], indent=1)
    options.results[0].write_text(text + "\n")
    page = options.page.read_text()
    for mark, (kind, variants, first) in TABLES.items():
        if f"<!-- {mark}: begin -->" in page:
            held = [row for row in rows if row.table == kind]
            page = fill(page, mark, table(held, variants, first))
    options.page.write_text(page)
    plot([row for row in rows if row.table == "presets"], options.page.with_suffix(".png"))


if __name__ == "__main__":
    main()
