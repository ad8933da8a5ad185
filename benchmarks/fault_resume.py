"""Kill -9 runs that have a journal, and the runs that resume them.

A calibrated run writes each finished group into its journal (fasp_graph/scale/journal.py). It is
killed before a random file event from the journal's beginning on; the run that goes on from there
is killed too, before any event; a third one ends. What the journal held after a kill stays as it
is, byte for byte; the folder is that of an undisturbed run, and the journal is gone.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path

from fasp_graph.scale.journal import work_folder

from . import faults
from .faults import Bench, Lost

LAYERS = 3  # as many stops of the walk


def resumes(found: Bench, draw: random.Random, rounds: int) -> dict[str, int]:
    """`rounds` runs killed twice each; how many kills hit, and how many stops were taken over."""
    model, target = found.scratch / "deep", found.scratch / "resumed" / "small"
    target.parent.mkdir()
    faults.source(model, LAYERS)
    argv = ["prune", str(model), "--method", "fasp", "--output", str(target), "--json"]
    argv += ["--calibration", "benchmarks.fault_cases:batches"]
    log, counted = found.scratch / "log", found.scratch / "resumed.events"
    faults.undisturbed(lambda: faults.command(argv, faults.counting(counted)), log)
    names = counted.read_text().split()
    expected, before = faults.digests(target), faults.digests(model)
    counts = {"kills while resuming": 0, "stops taken over": 0}
    for _ in range(rounds):
        shutil.rmtree(target)
        held: dict[str, str] = {}
        for first in (names.index("os.mkdir"), 0):
            counts["kills while resuming"] += _killed(argv, draw.randint(first, len(names)), log)
            held = _kept(held, target)
        counts["stops taken over"] += len(held)
        faults.undisturbed(lambda: faults.command(argv), log)
        if faults.digests(target) != expected:
            raise Lost("a run that resumed a resumed run gives other bytes")
        if [path.name for path in target.parent.iterdir()] != [target.name]:
            raise Lost("a resumed run leaves its journal or a draft behind")
    if faults.digests(model) != before:
        raise Lost("a resumed run changed the source model")
    return counts


def _killed(argv: list[str], last: int, log: Path) -> int:
    """1 if the run was killed before event `last`, 0 if it ended earlier."""

    def before_event(number: int, name: str) -> None:
        if number == last:
            os.kill(os.getpid(), signal.SIGKILL)

    code = faults.ended(faults.forked(lambda: faults.command(argv, before_event), log))
    if code not in (0, -signal.SIGKILL):
        raise Lost(f"a resumed run ends with {code}: {log.read_text()[-500:]}")
    return int(code != 0)


def _kept(held: dict[str, str], target: Path) -> dict[str, str]:
    """The finished stops after a kill; Lost if one of those `held` before is gone or changed."""
    work = work_folder(target)
    if not work.is_dir() or target.exists():  # done, or being cleared away
        return {}
    stops = {k: v for k, v in faults.digests(work).items() if k.endswith(".safetensors")}
    if not held.items() <= stops.items():
        raise Lost("a kill while resuming loses what the journal held")
    return stops
