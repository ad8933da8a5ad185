"""spill: live activations over a budget go from a device to memory, and from memory to files.

    bytes of live storages in memory <= budget, likewise on each device, when a batch has come to a
    stop; but inputs in memory, which are the user's

Files are mapped into memory: a mapped page is clean once it is written, so that the system may drop
it and read it again; only what a node works on must fit. A file vanishes with its tensor: it has no
name from the start.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from passes.errors import FaspGraphError

SMALLEST = 1 << 16  # bytes; a file for less costs more than it saves
Place = tuple[dict[Node, Any], Node]
HOST = torch.device("cpu")


class Spill:
    """Moves the largest live values out until the rest fits into half of `budget` bytes, whenever
    they may be more than it: what comes until then is counted, and seldom all that is there.
    """

    def __init__(self, budget: int, folder: str | os.PathLike[str] | None = None) -> None:
        self.budget = budget
        self.folder = Path(folder or tempfile.gettempdir())
        self.written = 0
        self._left = 0
        self._mapped: dict[int, StorageWeakRef] = {}

    def __call__(
        self, environments: list[dict[Node, Any]], changed: dict[Node, Any] | None = None
    ) -> None:
        """Replace values in place. Views of one storage go together, into one file. `changed`: the
        one of them that has new values.
        """
        if changed is not None:
            self._left -= held_bytes(changed.values())
            if self._left >= 0:
                return
        self._mapped = {key: one for key, one in self._mapped.items() if not one.expired()}
        found = {_value(places).device for places in _by_storage(environments).values()}
        self._left = self.budget
        for device in (*sorted(found - {HOST}, key=str), HOST):
            held = _by_storage(environments).items()
            inside = [p for k, p in held if k not in self._mapped and _value(p).device == device]
            going = self._over(inside)
            left = self.budget - sum(map(_size, inside)) + sum(map(_size, going))
            self._left = min(self._left, left)
            for places in going:
                if device == HOST:
                    self._write(places)
                else:
                    _replace(places, _bytes(places).to(HOST))

    def _over(self, inside: list[list[Place]]) -> list[list[Place]]:
        """The largest storages, without which the others take half of the budget; none, if all of
        them fit into it.
        """
        found, total = [], sum(map(_size, inside))
        if total <= self.budget:
            return []
        for places in sorted(inside, key=_size, reverse=True):
            if total <= self.budget // 2 or _size(places) < SMALLEST:
                break
            found.append(places)
            total -= _size(places)
        return found

    def _write(self, places: list[Place]) -> None:
        old = _bytes(places)
        mapped = self._file(old.nbytes)
        mapped.copy_(old)
        _replace(places, mapped)
        storage = mapped.untyped_storage()
        self._mapped[storage._cdata] = StorageWeakRef(storage)
        self.written += old.nbytes

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


def held_bytes(values: Iterable[Any]) -> int:
    """Bytes of the storages of all tensors in values, each counted once."""
    tensors = [leaf for leaf in pytree.tree_leaves(list(values)) if isinstance(leaf, Tensor)]
    held = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage._cdata: storage.nbytes() for storage in held}.values())


def _value(places: list[Place]) -> Tensor:
    """Of the views of one storage that of the smallest elements."""
    return min((e[node] for e, node in places), key=lambda value: value.element_size())  # type: ignore[no-any-return]


def _size(places: list[Place]) -> int:
    return _value(places).untyped_storage().nbytes()


def _bytes(places: list[Place]) -> Tensor:
    """The whole storage that values lie in."""
    value = _value(places)
    count = value.untyped_storage().nbytes() // value.element_size()
    return value.as_strided((count,), (1,), 0).view(torch.uint8)


def _replace(places: list[Place], new: Tensor) -> None:
    """The values of one storage, in the bytes `new`."""
    for environment, node in places:
        value = environment[node]
        whole = new[: len(new) // value.element_size() * value.element_size()].view(value.dtype)
        environment[node] = whole.as_strided(value.shape, value.stride(), value.storage_offset())


def _by_storage(environments: list[dict[Node, Any]]) -> dict[int, list[Place]]:
    """Storage -> where its views are. One stays out that a list of results shares, or a value that
    is the conjugate or the negative of what lies there.
    """
    found: dict[int, list[Place]] = {}
    inner: set[int] = set()
    for environment in environments:
        for node, value in environment.items():
            if isinstance(value, Tensor) and not (value.is_conj() or value.is_neg()):
                if node.op != "placeholder" or value.device != HOST:  # the user holds those
                    key = value.untyped_storage()._cdata
                    found.setdefault(key, []).append((environment, node))
                continue
            leaves = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
            inner |= {leaf.untyped_storage()._cdata for leaf in leaves}
    return {key: places for key, places in found.items() if key not in inner and _size(places)}
