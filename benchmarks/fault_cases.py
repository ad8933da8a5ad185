"""Faults other than kills, on the folders of benchmarks/faults.py.

full disk     a tmpfs too small for the folder where this process may mount one; else a limit on
              the size of a file
altered       a byte of weights or configuration changed, or the end cut off: `load` refuses
resumes       runs with a journal, killed twice (benchmarks/fault_resume.py)
two writers   two processes save to one folder, again and again: what is there is always whole
lost rank     one of two processes of torchrun is killed: the other ends too, and says why
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fasp_graph as fg

from . import fault_resume, faults
from .faults import PATIENCE, ROOT, Bench, Lost


def all_cases(found: Bench, seed: int) -> dict[str, Any]:
    """Every case, in full; counts."""
    draw = random.Random(seed)
    return {
        "full disks": full_disks(found, draw, 6),
        "altered files refused": altered(found, draw, 200),
        "saves by two writers": two_writers(found, 20),
        **fault_resume.resumes(found, draw, 20),
        "lost ranks": sum(lost_rank(found, draw) for _ in range(3)),
    }


def full_disks(found: Bench, draw: random.Random, rounds: int) -> int:
    """Runs that do not fit, each with an earlier folder in place; how many."""
    largest = max(path.stat().st_size for path in (found.scratch / "later").iterdir())
    for _ in range(rounds):
        shutil.rmtree(found.target, ignore_errors=True)
        shutil.copytree(found.scratch / "earlier", found.target)
        limit = draw.randrange(1024, largest)

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            faults.command(faults.arguments(found.source, found.target))

        _refused(found, faults.ended(faults.forked(limited, found.scratch / "log")))
    return rounds + (_tmpfs(found) if os.geteuid() == 0 else 0)


def _refused(found: Bench, code: int) -> None:
    said = (found.scratch / "log").read_text(encoding="utf-8")
    if code != 2 or "cannot be written" not in said or "Traceback" in said:
        raise Lost(f"a full disk gives exit code {code}: {said[-300:]}")
    if faults.digests(found.target) != found.earlier:
        raise Lost("a full disk changes the earlier folder")
    if faults.drafts(found.target):
        raise Lost("a full disk leaves a draft behind")


def _tmpfs(found: Bench) -> int:
    """A file system with room for the earlier folder and a part of the new one; 1 if mounted."""
    at = found.scratch / "disk"
    at.mkdir(exist_ok=True)
    size = sum(path.stat().st_size for path in (found.scratch / "earlier").iterdir())
    call = ["mount", "-t", "tmpfs", "-o", f"size={int(1.3 * size) + 40_000}", "tmpfs", str(at)]
    if subprocess.run(call, capture_output=True).returncode:
        return 0
    try:
        target = at / "small"
        shutil.copytree(found.scratch / "earlier", target)
        run = faults.forked(
            lambda: faults.command(faults.arguments(found.source, target)), found.scratch / "log"
        )
        code, said = faults.ended(run), (found.scratch / "log").read_text(encoding="utf-8")
        if code != 2 or "No space left" not in said or faults.digests(target) != found.earlier:
            raise Lost(f"a full file system gives exit code {code}: {said[-300:]}")
    finally:
        subprocess.run(["umount", str(at)], check=True)
    return 1


def altered(found: Bench, draw: random.Random, rounds: int) -> int:
    """Changed and truncated weights, every fourth time configurations; how many were refused."""
    folder = found.scratch / "altered"
    shutil.copytree(found.scratch / "later", folder, dirs_exist_ok=True)
    for number in range(rounds):
        path = folder / ("model.safetensors" if number % 4 else "config.json")
        whole = path.read_bytes()
        at = draw.randrange(len(whole))
        flipped = whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :]
        path.write_bytes(draw.choice([whole[:at], flipped, whole + b"\0", flipped]))
        try:
            fg.load(folder)
        except fg.FaspGraphError:
            path.write_bytes(whole)
            continue
        raise Lost(f"{path.name} altered at byte {at} passes load")
    shutil.rmtree(folder)
    return rounds


def two_writers(found: Bench, rounds: int) -> int:
    """Two processes that save different plans to one folder; how many saves there were."""
    model, images = faults.source(found.scratch / "again"), torch.randn(2, 3, 16, 16)
    plans = [
        fg.prune(model, images, None, fg.Config(sparsity=s, method="magnitude")) for s in (0.2, 0.4)
    ]
    shutil.rmtree(found.target, ignore_errors=True)

    def saves(number: int) -> None:
        for _ in range(rounds):
            plans[number].save(found.target)

    runs = [
        faults.forked(lambda n=n: saves(n), found.scratch / f"log{n}") for n in range(len(plans))
    ]
    for number, code in enumerate([faults.ended(run) for run in runs]):
        if code:
            raise Lost(f"writer {number}: {(found.scratch / f'log{number}').read_text()[-500:]}")
    state = fg.load(found.target).state_dict()
    if not any(_equal(state, plan.model.state_dict()) for plan in plans):
        raise Lost("two writers leave a mixture")
    if faults.drafts(found.target):
        raise Lost("two writers leave a draft behind")
    return rounds * len(plans)


def _equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    same = left.keys() == right.keys()
    return same and all(torch.equal(value, right[name]) for name, value in left.items())


def batches() -> list[dict[str, torch.Tensor]]:
    """Calibration of the runs under torchrun: a factory of the command line."""
    generator = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)} for _ in range(4)]


def lost_rank(found: Bench, draw: random.Random) -> int:
    """torchrun with two ranks of which one is killed; 1 if the kill came before the end."""
    shutil.rmtree(found.target, ignore_errors=True)
    argv = ["prune", str(found.source), "--method", "fasp", "--output", str(found.target)]
    argv += ["--calibration", "benchmarks.fault_cases:batches"]
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    log = found.scratch / "log"
    with log.open("w", encoding="utf-8") as stream:
        run = subprocess.Popen(
            [*call, "-m", "fasp_graph", *argv], cwd=ROOT, stdout=stream, stderr=stream
        )
    ranks = _workers(run)
    time.sleep(draw.uniform(0, 10 + found.seconds))
    victim = draw.choice(ranks)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        victim = 0
    try:
        code = run.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        run.kill()
        raise Lost("a lost rank hangs the others") from None
    said = log.read_text(encoding="utf-8")
    if found.target.exists():
        fg.load(found.target)  # rank 0 had written it, whole
    elif code == 0:
        raise Lost(f"torchrun ends well and writes nothing: {said[-300:]}")
    if code and f"exitcode  : {-signal.SIGKILL} (pid: {victim})" not in said:
        raise Lost(f"torchrun does not name the lost rank: {said[-600:]}")
    return int(code != 0)


def _workers(run: subprocess.Popen[bytes]) -> list[int]:
    """The two ranks' process ids, once torchrun has started them."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    limit = time.monotonic() + PATIENCE
    while time.monotonic() < limit:
        found = [int(pid) for pid in children.read_text().split()]
        if len(found) >= 2:
            return found[-2:]
        time.sleep(0.05)
    raise Lost("torchrun starts no ranks")
