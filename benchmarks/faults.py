"""Kill -9 real `prune --output` processes at random points, and see what is left.

    python -m benchmarks.faults [--kills 100] [--seed 0] [--output build/faults.json]

fresh   a new interpreter, killed after a random time
clock   a forked one that has everything imported, killed after a random time
event   a forked one that kills itself before a random file event (open, mkdir, rename, chmod...)
write   the same, at an event after the first one that writes

After each kill: the source folder has the same bytes; the target is missing (only where none was),
or is, byte for byte, the earlier folder or the new one; no draft beside it passes `load` with other
weights. Then the run is repeated: it must give the same bytes as an undisturbed one, and sweep the
draft away. The other faults are those of benchmarks/fault_cases.py and fault_resume.py.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import fasp_graph as fg
from fasp_graph import cli
from fasp_graph.scale.journal import work_folder

ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240  # seconds, of one run; what lasts longer hangs
MEASURED = ("report.json", "report.html")  # the files that tell seconds
KINDS = (
    "clock",
    "write",
    "event",
    "write",
)  # most of a run's seconds pass before anything is written


class Lost(AssertionError):
    """A fault left something wrong behind."""


@dataclass(frozen=True)
class Bench:
    """A scratch folder with a source model, and what undisturbed runs make of it.

    `seconds`, `events`: of an undisturbed forked run; `writes`: its first event that writes.
    """

    scratch: Path
    earlier: dict[str, str]
    later: dict[str, str]
    seconds: float
    events: int
    writes: int

    @property
    def source(self) -> Path:
        """The model that is pruned."""
        return self.scratch / "source"

    @property
    def target(self) -> Path:
        """Where each run writes."""
        return self.scratch / "work" / "small"


def source(folder: Path, layers: int = 1) -> nn.Module:
    """A ConvNeXt of one layer, as transformers saves it: captured in a second."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8], "depths": [layers], "num_stages": 1, "image_size": 16}
    config = transformers.ConvNextConfig(**sizes)
    model: nn.Module = transformers.ConvNextModel(config).eval()
    model.save_pretrained(folder)
    return model


def arguments(model: Path, target: Path, sparsity: float = 0.3) -> list[str]:
    """Of the command line; `magnitude` needs no data."""
    method = ["--method", "magnitude", "--sparsity", str(sparsity)]
    return ["prune", str(model), *method, "--output", str(target), "--json"]


def forked(work: Callable[[], Any], log: Path) -> int:
    """The process id of a fork that does `work`, then ends with the command line's exit code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    torch.set_num_threads(1)  # threads do not survive a fork: to wait for one is to hang
    try:
        with log.open("w", encoding="utf-8", buffering=1) as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            sys.stdout = sys.stderr = stream
            work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def ended(pid: int, patience: float = PATIENCE) -> int:
    """The exit code of a process, negative if a signal ended it; Lost if it hangs."""
    limit = time.monotonic() + patience
    while time.monotonic() < limit:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise Lost(f"a run hung for {patience:.0f} s")


def command(argv: list[str], before_event: Callable[[int, str], None] | None = None) -> None:
    """The command line in this process; `before_event` sees each file event's number and name."""
    if before_event is not None:
        numbers = iter(range(10**9))

        def watch(event: str, args: tuple[Any, ...]) -> None:
            if event == "open" or event.startswith(("os.", "shutil.", "ctypes.dlsym")):
                before_event(next(numbers), event)

        sys.addaudithook(watch)
    sys.argv = ["fasp-graph", *argv]
    cli.main()


def digests(folder: Path) -> dict[str, str]:
    """File -> sha256, without the files that tell seconds."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in MEASURED
    }


def drafts(target: Path) -> list[str]:
    """What lies beside `target` and should not: all but the journal of a run that may go on."""
    held = {target.name, work_folder(target).name}
    return [path.name for path in target.parent.iterdir() if path.name not in held]


def bench(scratch: Path) -> Bench:
    """Make the source, warm this process up, and run undisturbed, twice at another sparsity."""
    model, target, log = scratch / "source", scratch / "work" / "small", scratch / "log"
    target.parent.mkdir(parents=True)
    fg.prune(source(model), torch.randn(2, 3, 16, 16), None, fg.Config(method="magnitude"))
    undisturbed(lambda: command(arguments(model, target, 0.15)), log)
    shutil.copytree(target, scratch / "earlier")
    counted, started = scratch / "events", time.monotonic()
    undisturbed(lambda: command(arguments(model, target), counting(counted)), log)
    seconds, names = time.monotonic() - started, counted.read_text().split()
    earlier, later = digests(scratch / "earlier"), digests(target)
    shutil.copytree(target, scratch / "later")
    return Bench(scratch, earlier, later, seconds, len(names), names.index("os.mkdir"))


def counting(path: Path) -> Callable[[int, str], None]:
    """Writes each event's name into a file that is opened beforehand."""
    handle = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def note(number: int, name: str) -> None:
        os.write(handle, f"{name}\n".encode())

    return note


def undisturbed(work: Callable[[], Any], log: Path) -> None:
    if ended(forked(work, log)):
        raise Lost(f"an undisturbed run failed: {log.read_text()[-500:]}")


def kill(found: Bench, kind: str, draw: random.Random) -> str:
    """One run that is killed, judged and repeated: `killed`, or `finished` if it was faster."""
    before = digests(found.source)
    shutil.rmtree(found.target, ignore_errors=True)
    earlier = draw.random() < 0.5
    if earlier:
        shutil.copytree(found.scratch / "earlier", found.target)
    code = _killed(found, kind, draw)
    if code not in (0, -signal.SIGKILL):
        raise Lost(f"{kind}: exit code {code}: {(found.scratch / 'log').read_text()[-500:]}")
    _judge(found, earlier, finished=code == 0)
    run = forked(lambda: command(arguments(found.source, found.target)), found.scratch / "log")
    if ended(run) or digests(found.target) != found.later:
        raise Lost(f"{kind}: a repeated run gives other bytes")
    if [path.name for path in found.target.parent.iterdir()] != [found.target.name]:
        raise Lost(f"{kind}: a repeated run leaves a draft behind")
    if digests(found.source) != before:
        raise Lost(f"{kind}: the source model was changed")
    return "killed" if code else "finished"


def _killed(found: Bench, kind: str, draw: random.Random) -> int:
    argv, log = arguments(found.source, found.target), found.scratch / "log"
    if kind in ("event", "write"):
        last = draw.randint(found.writes if kind == "write" else 0, found.events)

        def before_event(number: int, name: str) -> None:
            if number == last:
                os.kill(os.getpid(), signal.SIGKILL)

        return ended(forked(lambda: command(argv, before_event), log))
    if kind == "clock":
        run = forked(lambda: command(argv), log)
        time.sleep(draw.uniform(0, found.seconds))
    else:
        with log.open("w", encoding="utf-8") as stream:
            call = [sys.executable, "-m", "fasp_graph", *argv]
            run = subprocess.Popen(call, cwd=ROOT, stdout=stream, stderr=stream).pid
        time.sleep(draw.uniform(0, 3 * found.seconds + 10))
    os.kill(run, signal.SIGKILL)
    return ended(run)


def _judge(found: Bench, earlier: bool, finished: bool) -> None:
    """Lost if anything but the earlier folder, the new folder or rubbish is there."""
    target = found.target
    if not target.exists():
        if earlier or finished:
            raise Lost("the folder is gone")
    else:
        allowed = [found.later, *([found.earlier] if earlier and not finished else [])]
        if digests(target) not in allowed:
            raise Lost(f"{target} is neither the earlier folder nor the new one")
        fg.load(target)
    weights = {held["model.safetensors"] for held in (found.earlier, found.later)}
    for draft in target.parent.glob(".*"):
        if _loads(draft) and digests(draft)["model.safetensors"] not in weights:
            raise Lost(f"{draft.name} passes load with other weights")


def _loads(folder: Path) -> bool:
    try:
        fg.load(folder)
    except fg.FaspGraphError:
        return False
    return True


def kills(found: Bench, count: int, seed: int = 0, fresh: int = 0) -> dict[str, int]:
    """`count` kills, `fresh` of them of new interpreters; counts of what happened."""
    draw = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    for number in range(count):
        kind = "fresh" if number < fresh else KINDS[number % len(KINDS)]
        counts[f"{kind} {kill(found, kind, draw)}"] += 1
        if count > 20:
            print(f"\r{number + 1} of {count} kills", end="", file=sys.stderr, flush=True)
    return dict(sorted(counts.items()))


def main(argv: list[str] | None = None) -> int:
    from . import fault_cases

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "faults.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        found = bench(Path(scratch))
        counts = kills(found, options.kills, options.seed, fresh=options.kills // 20)
        others = fault_cases.all_cases(found, options.seed)
    result = {"kills": options.kills, **counts, **others, "lost": 0}
    result["seconds"] = round(time.monotonic() - started)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
