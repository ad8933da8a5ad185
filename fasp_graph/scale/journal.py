"""journal: what a walk has decided so far, on disk, so that a later run goes on from there.

    folder/key.json          sha256 of all that the result depends on
    folder/times.json        with budget="latency": the seconds that were measured for the plan
    folder/00007.safetensors after the 8th stop of the walk: the repaired weights; as metadata the
                             node and what it adds to each table of HELD

A stop is a node that consumes groups. A later run with the same key takes the weights of finished
stops as they are, bit for bit, and only runs the model up to the first stop that is not there:
forward passes are repeated, Gram matrices, choices and solves are not. Another key empties the
folder. Files appear whole or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from passes.errors import FaspGraphError
from passes.lazy import Lazy, is_lazy
from passes.observe import Walk
from passes.placement import home

from ..config import Config
from ..folders.manifest import versions
from ..folders.shards import metadata, stored, write_shard
from .distributed import total, world

try:
    import fcntl
except ImportError:  # not a POSIX system: journals are not locked
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from ..walking import Decisions

Visit = Callable[[Walk, Node], None]
KEY = "key.json"
HELD = (
    "kept",
    "errors",
    "seen",
    "untold",
    "ridges",
    "scores",
    "orders",
)  # tables of Decisions that a stop adds to: name -> tuple


@dataclass(frozen=True)
class Journal:
    """The stops of one walk in a folder. `lazily`: repaired weights are read back from the files
    when they are needed, and not held. `finished`: node -> its file. `lock`: held by this process.
    """

    folder: Path
    lazily: bool
    finished: dict[str, Path] = field(default_factory=dict)
    lock: IO[str] | None = None

    def recall(self, node: str, state: Walk, decided: Decisions) -> bool:
        """Take over a finished stop; False if it is not there."""
        path = self.finished.get(node)
        if path is None:
            return False
        about = metadata(path)
        for table in HELD:
            added = json.loads(about.get(table, "{}"))
            getattr(decided, table).update({name: tuple(held) for name, held in added.items()})
        found = self._weights(path)
        if not self.lazily:
            found = {name: held.to(home(state.module, name)) for name, held in found.items()}
        state.weights |= found
        return True

    def add(
        self, node: str, tables: Mapping[str, Any], weights: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Write a stop; the weights as the walk shall hold them."""
        path = self.folder / f"{len(self.finished):05d}.safetensors"
        if world()[0] == 0:
            about = {"node": node, **{table: json.dumps(tables[table]) for table in HELD}}
            draft = path.with_suffix(".draft")
            write_shard(draft, weights, about)
            os.replace(draft, path)
        self.finished[node] = path
        if not self.lazily:
            return dict(weights)
        total(torch.zeros(1))  # no rank reads before rank 0 has written
        return self._weights(path)

    def once(self, name: str, make: Callable[[], dict[str, float]]) -> dict[str, float]:
        """What `make` gave when the run began: where it differs from run to run, a run that goes on
        goes on with the same. `make` must bring all ranks together, if there are several.
        """
        path = self.folder / f"{name}.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
        made = make()
        if world()[0] == 0:
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(made) + "\n", encoding="utf-8")
            os.replace(draft, path)
        return made

    def _weights(self, path: Path) -> dict[str, Tensor]:
        found = stored(path).items()
        return {name: held.lazy() if self.lazily else held.read() for name, held in found}


def work_folder(output: str | os.PathLike[str]) -> Path:
    """Where the journal of a run lies that writes `output`: hidden, beside it."""
    target = Path(os.path.abspath(output))
    return target.parent / f".{target.name}.work"


def watch(journal: Journal | None, visit: Visit, decided: Decisions) -> Visit:
    """`visit`, but finished stops are recalled, and the others written down."""
    if journal is None:
        return visit

    def visit_once(state: Walk, node: Node) -> None:
        if journal.recall(node.name, state, decided):
            return
        weights = dict(state.weights)
        before = {table: dict(getattr(decided, table)) for table in HELD}
        visit(state, node)
        new = {n: w for n, w in state.weights.items() if weights.get(n) is not w}
        added = {table: _added(before[table], getattr(decided, table)) for table in HELD}
        state.weights |= journal.add(node.name, added, new)

    return visit_once


def _added(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    return {name: held for name, held in after.items() if before.get(name) != held}


def open_journal(folder: Path, key: str, module: GraphModule) -> Journal:
    """The journal of the run with this key. All ranks of a run agree on what is finished."""
    lock = _begin(folder, key) if world()[0] == 0 else None
    total(torch.zeros(1))  # the others wait for rank 0
    if not (folder / KEY).is_file():
        raise FaspGraphError(
            f"rank {world()[0]} does not see {folder} · help: processes on several machines need "
            "an output folder on a file system that all of them see"
        )
    paths = sorted(folder.glob("*.safetensors"))
    count = len(paths)
    seen = [count * float(r == world()[0]) for r in range(world()[1])]
    agreed = int(total(torch.tensor(seen)).min())
    finished = {metadata(path)["node"]: path for path in paths[:agreed]}
    return Journal(folder, is_lazy(module), finished, lock)


def _begin(folder: Path, key: str) -> IO[str]:
    """A folder with this key, as it is or emptied if it was another run's; its lock."""
    held = folder / KEY
    lock = _lock(held) if held.is_file() else None
    try:
        same = json.loads(held.read_text(encoding="utf-8")).get("key") == key
    except (OSError, ValueError, AttributeError):
        same = False
    if not same:
        close(folder)
        folder.mkdir(parents=True)
        held.write_text(json.dumps({"key": key}) + "\n", encoding="utf-8")
    for draft in folder.glob("*.draft"):
        draft.unlink()
    if lock is not None:
        lock.close()
    return _lock(held)  # anew: the system drops it when this process closes any handle of the file


def _lock(path: Path) -> IO[str]:
    """An open file that no other process can lock while it is open; gone with the process."""
    lock = path.open("r+", encoding="utf-8")
    if fcntl is None:
        return lock
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        lock.close()
        raise FaspGraphError(
            f"another process works in {path.parent} · help: wait for it, or choose another output"
        ) from error
    except OSError:
        pass  # a file system without locks
    return lock


def close(folder: Path) -> None:
    """Remove a journal, and nothing that is none."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    if names and KEY not in names:
        raise FaspGraphError(f"{folder} is no journal of fasp_graph · help: choose another folder")
    for path in sorted(folder.iterdir(), key=lambda held: held.name == KEY):
        path.unlink()  # the key last: a kill in between leaves what is still a journal
    folder.rmdir()


def fingerprint(module: GraphModule, batches: Iterable[Any], config: Config) -> str:
    """sha256 of all that decisions depend on: program, weights, data, options, versions, number
    of processes. A lazy weight counts by its place (file, date, offset), not by its numbers.
    """
    told = [module.code, dataclasses.asdict(config), versions(), world()[1]]
    found = hashlib.sha256(repr(told).encode())
    held = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in held:
        found.update(repr((name, tuple(tensor.shape), tensor.dtype, tensor.device.type)).encode())
        _add(found, tensor)
    for batch in batches:
        for leaf in pytree.tree_leaves(batch):
            _add(found, leaf)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    if isinstance(value, Lazy) and value.mark:
        found.update(value.mark.encode())
    elif isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous().reshape(-1)
        found.update(repr(tuple(value.shape)).encode())
        found.update(plain.view(torch.uint8).numpy() if plain.numel() else b"")
    else:
        found.update(repr(value).encode())
