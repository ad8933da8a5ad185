"""coverage_page: rows of benchmarks.coverage -> benchmarks/results/coverage.json, docs/coverage.md.

    python -m benchmarks.coverage_page [build/coverage.jsonl] [--random]

With rows: keep what the page needs of them, beside the types of earlier runs. Without: write the
page anew from what was kept. The rows of a random order are counted by themselves as well.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers

from . import coverage
from .build_type import types
from .cover_type import KINDS
from .timm_families import PREFIX

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
PAGE = ROOT / "docs" / "coverage.md"
LONGEST = 110  # characters of a reason

TEXT = """# Coverage

Every model type that the installed transformers maps to a model class: built from a configuration
that is shrunk by what its numbers mean (no weights are downloaded), captured, analysed; then half
of all its chain, bilinear and head groups goes, kind by kind, and the compact graph is compared
with the masked dense one in float64. `python -m benchmarks.coverage` makes the rows;
`python -m benchmarks.coverage_page` keeps them in `benchmarks/results/coverage.json` and writes
this page.

{versions}

{note}

{totals}

{sample}

*Verified*: every kind of group that the type has equals the masked dense model within {exact:.0e}.
*Wrong*: a difference beyond that; the check after each prune reports it, nothing is written.
A layer *has a chain* if the axis inside an MLP, or the values of an attention, can be pruned by
themselves. Where it cannot, the reason names what holds the axis: a norm over the values of all
heads mixes them, a hidden state that the model returns must keep its shape.

## Why a layer has no chain

{layers}

## What else went wrong

{failures}

## The types

{table}

## Families of timm

The smallest model of each module of timm whose name sounds small, at its own width and depth, on
images of 128 x 128 or another size that it takes (`python -m benchmarks.coverage --timm`).

{families}
"""


def main() -> None:
    """Write the results, if there are new rows, and the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("rows", type=Path, nargs="?", help="the output of benchmarks.coverage")
    parser.add_argument(
        "--random", action="store_true", help="the rows are the first of a random order"
    )
    parser.add_argument("--note", default="", help="how the types were chosen, if not all ran")
    options = parser.parse_args()
    if options.rows is not None:
        found = sorted(coverage.read(options.rows), key=lambda row: row["type"])
        before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
        results = {**kept(found, before, options.random), "note": options.note}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(json.loads(RESULTS.read_text())))


def kept(
    rows: list[dict[str, Any]], before: list[dict[str, Any]] | None = None, random: bool = False
) -> dict[str, Any]:
    """What the page needs: versions, how many types there are, and a short form of each row; of
    the types in `before`, those that were not run anew.
    """
    anew = {row["type"] for row in rows}
    short = [_short(row) | {"random": random} for row in rows]
    held = [row for row in before or [] if row["type"] not in anew]
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "types": len(types()),
        "rows": sorted([*held, *short], key=lambda row: str(row["type"])),
    }


def _short(row: dict[str, Any]) -> dict[str, Any]:
    errors = [v for v in row.get("verified", {}).values() if isinstance(v, float)]
    exact = bool(errors) and row["stage"] == "done" and not coverage._failed(row)
    return {
        "type": row["type"],
        "class": row.get("class", ""),
        "captured": coverage.captured(row),
        "verified": exact,
        "wrong": "differ by" in coverage.why(row),
        "groups": {k: n for k, n in row.get("groups", {}).items() if k != "frozen"},
        "prunable": row.get("prunable"),
        "layers": row.get("layers", {}),
        "without": row.get("without", {}),
        "error": max(errors, default=None),
        "reason": _words(coverage.why(row)),
    }


def _words(reason: str) -> str:
    """The reason without numbers of nodes and shapes."""
    reason = re.sub(r" · (node|module|model|help|nothing).*", "", reason)
    reason = re.sub(r"^(build|capture|analyse|verify): (\w+Error: )*", r"\1: ", reason)
    return reason if len(reason) <= LONGEST else reason[: LONGEST - 3] + "..."


def page(results: dict[str, Any]) -> str:
    """The page, as Markdown."""
    rows, families = _parted(results["rows"])
    return TEXT.format(
        versions=f"torch {results['torch']}, transformers {results['transformers']}: "
        f"{len(rows)} of {results['types']} types were run.",
        note=results.get("note", ""),
        exact=coverage.EXACT,
        sample=_sample([row for row in rows if row.get("random")]),
        totals=_markdown(("what", "types", "share"), _totals(rows)),
        layers=_markdown(("reason", "layers", "types"), _held(rows)),
        failures=_markdown(("reason", "types"), _failures(rows)),
        table=_markdown(HEAD, [_line(row) for row in rows]),
        families=_families(families),
    )


def _parted(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Types of transformers, and families of timm without the prefix."""
    types = [row for row in rows if not row["type"].startswith(PREFIX)]
    found = [row for row in rows if row["type"].startswith(PREFIX)]
    return types, [row | {"type": row["type"].removeprefix(PREFIX)} for row in found]


def _families(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "Not run."
    totals = _markdown(("what", "families", "share"), _totals(rows))
    return f"{totals}\n\n{_markdown(HEAD, [_line(row) for row in rows])}"


def _totals(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    built = [row for row in rows if row["class"]]
    seen = [row for row in built if row["captured"]]
    exact = [row for row in seen if row["verified"]]
    layered = [row for row in exact if any(n for _, n in row["layers"].values())]
    whole = [row for row in layered if all(a == b for a, b in row["layers"].values())]
    nothing = [row for row in seen if not set(row["groups"]) & set(KINDS)]
    worst = max((row["error"] for row in exact if row["error"] is not None), default=0.0)
    return [
        ("run", len(rows), ""),
        ("built", len(built), _share(built, rows)),
        ("captured", len(seen), f"{_share(seen, built)} of the built"),
        (f"verified, largest error {worst:.0e}", len(exact), f"{_share(exact, seen)} of captured"),
        ("nothing to prune exactly", len(nothing), ""),
        ("with an MLP or attention", len(layered), "of the verified"),
        ("a chain in each of them", len(whole), f"{_share(whole, layered)} of these"),
        ("wrong", sum(row["wrong"] for row in rows), ""),
    ]


def _sample(rows: list[dict[str, Any]]) -> str:
    """The same counts for the types of the random order: what they say holds for the others."""
    if not rows:
        return ""
    lines = _markdown(("what", "types", "share"), _totals(rows))
    return f"Of these, the {len(rows)} first of a random order of all types:\n\n{lines}"


def _share(part: list[Any], whole: list[Any]) -> str:
    return f"{len(part) / max(len(whole), 1):.0%}"


def _held(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    layers: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for row in rows:
        found = {f"{k}: {w}": n for k, words in row["without"].items() for w, n in words.items()}
        layers.update(found)
        held.update(found.keys())
    return [(words, count, held[words]) for words, count in layers.most_common()]


def _failures(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    failed = [row["reason"] for row in rows if not row["captured"] or _stopped(row)]
    return list(Counter(re.sub(r"[%\d]+", "#", reason) for reason in failed).most_common())


def _stopped(row: dict[str, Any]) -> bool:
    """Captured, with something to prune, and yet not verified."""
    return not row["verified"] and bool(set(row["groups"]) & set(KINDS))


HEAD = ("type", "class", "groups", "prunable", "MLP", "attention", "error", "reason")


def _line(row: dict[str, Any]) -> tuple[Any, ...]:
    groups = " ".join(f"{k} {row['groups'][k]}" for k in (*KINDS, "width") if k in row["groups"])
    layers = ["/".join(map(str, row["layers"].get(k, []))) for k in ("mlp", "attention")]
    share = "" if row["prunable"] is None else f"{row['prunable']:.0%}"
    error = "" if row["error"] is None else f"{row['error']:.0e}"
    return (row["type"], row["class"], groups, share, *layers, error, row["reason"])


def _markdown(head: tuple[str, ...], lines: list[tuple[Any, ...]]) -> str:
    def text(cells: tuple[Any, ...]) -> str:
        return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"

    return "\n".join([text(head), "|" + "---|" * len(head), *map(text, lines)])


if __name__ == "__main__":
    main()
