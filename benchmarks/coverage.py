"""Which model types of the installed transformers, or families of timm, the compiler covers.

    python -m benchmarks.coverage [--types llama,t5] [--sample 40] [--output build/coverage.jsonl]
    python -m benchmarks.coverage --timm [--types timm:resnet]

Every type that can be built from a shrunken configuration: capture, analyse, prune half of every
chain, bilinear and head group, verify. One process per type with limits of time and memory; a
line of JSON per type, so that a run can be resumed; then a table and a summary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import resource
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .build_type import types
from .cover_type import KINDS, cover
from .timm_families import families

EXACT = 1e-9
FIRST = "bert"
PATIENCE = 6  # the clock may run so much longer than the CPU: other work shares the machine


def main() -> None:
    options = _options()
    names = families() if options.timm else types()
    names = options.types.split(",") if options.types else names
    if options.sample:
        names = sorted(random.Random(0).sample(names, min(options.sample, len(names))))
    if options.shuffle is not None:
        names = random.Random(options.shuffle).sample(names, len(names))
    rows = [] if options.fresh or not options.output.exists() else read(options.output)
    known = {row["type"] for row in rows}
    missing = [name for name in names if name not in known]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w" if options.fresh else "a") as file:
        for row in run(missing, options.workers, options.seconds, options.gigabytes):
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
    wanted = [row for row in sorted(rows, key=lambda r: r["type"]) if row["type"] in set(names)]
    console = Console(width=170)
    console.print(table(wanted))
    console.print_json(json.dumps(summary(wanted)))
    options.output.with_suffix(".summary.json").write_text(
        json.dumps(summary(wanted), indent=2) + "\n"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", help="comma-separated; default: all")
    parser.add_argument("--timm", action="store_true", help="the families of timm instead")
    parser.add_argument("--sample", type=int, help="a fixed random sample of so many types")
    parser.add_argument(
        "--shuffle", type=int, help="a seed: types in a random order, so that a part is a sample"
    )
    parser.add_argument("--output", type=Path, default=Path("build/coverage.jsonl"))
    parser.add_argument("--fresh", action="store_true", help="forget the rows of earlier runs")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=180, help="of CPU, limit per type")
    parser.add_argument("--gigabytes", type=float, default=8, help="limit per type")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run; the last of a type counts."""
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return list({row["type"]: row for row in rows}.values())


def run(names: list[str], workers: int, seconds: int, gigabytes: float) -> Any:
    """Rows as they come. A forked process per type: what one type leaves behind ends with it."""
    context = multiprocessing.get_context("fork")
    if len(names) > 2:
        cover(FIRST)  # imports what most types need, before the forks: it is half of a small type
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    waiting, running = list(reversed(names)), {}
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("types", total=len(names))
        while waiting or running:
            while waiting and len(running) < workers:
                name = waiting.pop()
                receive, send = context.Pipe(duplex=False)
                child = context.Process(target=_child, args=(name, send, seconds, gigabytes))
                child.start()
                send.close()
                running[name] = (child, receive, time.monotonic() + PATIENCE * seconds)
            multiprocessing.connection.wait([r for _, r, _ in running.values()], timeout=1)
            for name in list(running):
                row = _finished(name, *running[name])
                if row is not None:
                    del running[name]
                    progress.update(task, advance=1, description=f"{name:28.28}")
                    yield row


def _child(name: str, send: Any, seconds: int, gigabytes: float) -> None:
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    send.send(cover(name))
    send.close()


def _finished(name: str, child: Any, receive: Any, deadline: float) -> dict[str, Any] | None:
    """The row of a child that has ended or must end, else None."""
    row: dict[str, Any] | None = None
    if receive.poll():
        try:
            row = receive.recv()
        except EOFError:
            child.join()
            late = child.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
            words = "out of time" if late else f"ended with code {child.exitcode}"
            row = {"type": name, "stage": "limit", "reason": words}
    elif time.monotonic() > deadline:
        child.terminate()
        row = {"type": name, "stage": "limit", "reason": "out of time by the clock"}
    if row is not None:
        child.join()
    return row


def table(rows: list[dict[str, Any]]) -> Table:
    """One line per type."""
    result = Table(
        "type", "class", "captured", "groups", "prunable", "MLP", "attention", "error", "reason"
    )
    for row in rows:
        groups = row.get("groups", {})
        layers = row.get("layers", {})
        result.add_row(
            row["type"],
            row.get("class", ""),
            "yes" if captured(row) else "no",
            " ".join(f"{kind} {groups[kind]}" for kind in (*KINDS, "width") if kind in groups),
            f"{row['prunable']:.0%}" if "prunable" in row else "",
            *("/".join(map(str, layers.get(k, []))) for k in ("mlp", "attention")),
            _error(row),
            re.sub(r" · .*", "", why(row))[:90],
        )
    return result


def _error(row: dict[str, Any]) -> str:
    errors = [v for v in row.get("verified", {}).values() if isinstance(v, float)]
    return f"{max(errors):.0e}" if errors else ""


def captured(row: dict[str, Any]) -> bool:
    """Whether torch.export's graph computes what the model does."""
    return "nodes" in row


def why(row: dict[str, Any]) -> str:
    """Why the row is not complete, or ''."""
    if row.get("reason"):
        return f"{row['stage']}: {row['reason']}"
    if row.get("unchecked"):
        return f"analyse: {row['unchecked']}"
    failed = [f"{k}: {v}" for k, v in row.get("verified", {}).items() if isinstance(v, str)]
    if failed:
        return failed[0]
    short = [f"{k} {h}/{n} with a chain" for k, (h, n) in row.get("layers", {}).items() if h < n]
    held = [f"{words} ({n})" for k in row.get("without", {}).values() for words, n in k.items()]
    return f"{', '.join(short)}: {'; '.join(held)}" if short else ""


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts, and the reasons by number of types."""
    built = [row for row in rows if "class" in row]
    seen = [row for row in built if captured(row)]
    exact = [row for row in seen if row["stage"] == "done" and not _failed(row)]
    reasons = Counter(_cause(row) for row in seen if why(row))
    return {
        "types": len(rows),
        "built": len(built),
        "captured": len(seen),
        "verified": len(exact),
        "verified with every layer": sum(not why(row) for row in exact),
        "wrong": sum("differ by" in why(row) for row in seen),
        "reasons": dict(reasons.most_common(40)),
    }


def _failed(row: dict[str, Any]) -> bool:
    return any(
        isinstance(v, str) or (isinstance(v, float) and v > EXACT)
        for v in row.get("verified", {}).values()
    )


def _cause(row: dict[str, Any]) -> str:
    return re.sub(r"[%\d]+", "#", re.sub(r" · .*", "", why(row)))[:110]


if __name__ == "__main__":
    main()
