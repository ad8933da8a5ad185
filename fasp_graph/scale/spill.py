"""spill: live activations over a budget lie in files, mapped into memory.

    bytes of live storages in memory <= budget, after every node of the walk

A mapped page is clean once it is written, so that the system may drop it and read it again; only
what a node works on must fit. A file vanishes with its tensor: it has no name from the start.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from passes.errors import FaspGraphError

SMALLEST = 1 << 16  # bytes; a file for less costs more than it saves


class Spill:
    """Moves the largest live values out until the rest fits into `budget` bytes."""

    def __init__(self, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget = budget
        self.folder = Path(folder or tempfile.gettempdir())
        self.written = 0
        self._mapped: dict[int, int] = {}

    def __call__(self, environments: list[dict[Node, Any]]) -> None:
        """Replace values in place. Views of one storage go together, into one file."""
        held = _by_storage(environments)
        self._mapped = {key: size for key, size in self._mapped.items() if key in held}
        inside = {k: places for k, places in held.items() if k not in self._mapped}
        size = {k: _storage(places[0]).nbytes() for k, places in inside.items()}
        total = sum(size.values())
        for key in sorted(inside, key=lambda k: -size[k]):
            if total <= self.budget or size[key] < SMALLEST:
                return
            self._move(inside[key])
            total -= size[key]

    def _move(self, places: list[tuple[dict[Node, Any], Node]]) -> None:
        old = _storage(places[0])
        mapped = self._file(old.nbytes())
        mapped.untyped_storage().copy_(old)
        for environment, node in places:
            value = environment[node]
            moved = torch.empty(0, dtype=value.dtype)
            moved.set_(
                mapped.untyped_storage(), value.storage_offset(), value.shape, value.stride()
            )
            environment[node] = moved
        self._mapped[mapped.untyped_storage().data_ptr()] = old.nbytes()
        self.written += old.nbytes()

    def _file(self, size: int) -> Tensor:
        try:
            handle, name = tempfile.mkstemp(prefix="fasp-graph-", dir=self.folder)
            os.ftruncate(handle, size)
            os.close(handle)
            mapped = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            os.unlink(name)  # the mapping lives on; a crash leaves nothing behind
        except (OSError, RuntimeError) as error:
            raise FaspGraphError(
                f"activations cannot be spilled to {self.folder}: {error} · help: set TMPDIR to a "
                "folder with room, or a larger max_memory"
            ) from error
        return mapped


def _storage(place: tuple[dict[Node, Any], Node]) -> torch.UntypedStorage:
    value: Tensor = place[0][place[1]]
    return value.untyped_storage()


def _by_storage(
    environments: list[dict[Node, Any]],
) -> dict[int, list[tuple[dict[Node, Any], Node]]]:
    """Storage -> where its views are; a storage that a list of results shares stays out."""
    found: dict[int, list[tuple[dict[Node, Any], Node]]] = {}
    inner: set[int] = set()
    for environment in environments:
        for node, value in environment.items():
            if isinstance(value, Tensor):
                if value.device.type == "cpu" and node.op != "placeholder":
                    key = value.untyped_storage().data_ptr()
                    found.setdefault(key, []).append((environment, node))
                continue
            leaves = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            inner |= {leaf.untyped_storage().data_ptr() for leaf in leaves}
    return {key: places for key, places in found.items() if key not in inner and key}
