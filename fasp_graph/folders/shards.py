"""shards: safetensors files, one tensor in memory at a time.

    file = length of the header (8 bytes) + header {name: dtype, shape, [start, stop]} + numbers

Reading takes a tensor's bytes from the file when it is asked for; nothing is mapped, so memory is
what a tensor takes. Writing takes the bytes of one tensor after the other, lazy ones too.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.errors import FaspGraphError
from passes.lazy import Lazy, materialized

INDEX = "model.safetensors.index.json"
HEADER_LIMIT = 100_000_000  # bytes, as the format says
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: bytes [start, start + size) of a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        held = torch.empty(self.shape, dtype=self.dtype)
        if self.size:
            buffer = held.reshape(-1).view(torch.uint8).numpy()
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.start)
                if _fill(file, memoryview(buffer)) != self.size:
                    raise FaspGraphError(f"{self.path} ends early · help: fetch it again")
        return held

    def lazy(self, dtype: torch.dtype | None = None) -> Lazy:
        """The tensor as a promise, in another precision if one is given."""
        wanted = dtype or self.dtype
        at = self.path.stat()
        mark = repr((str(self.path.resolve()), at.st_size, at.st_mtime_ns, self.start, wanted))
        return Lazy(self.shape, wanted, lambda: self.read().to(wanted), mark)


def _fill(file: Any, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends; one call may bring less."""
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])
        if not count:
            break
        done += count
    return done


def stored(path: Path) -> dict[str, Stored]:
    """The tensors of one file; FaspGraphError if it is not whole."""
    header, start = _header(path)
    end, found = path.stat().st_size, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise FaspGraphError(
                f"{path}: {name} is {entry['dtype']}, which cannot be pruned · help: convert it to "
                "one of " + ", ".join(DTYPES)
            )
        first, last = entry["data_offsets"]
        held = Stored(path, DTYPES[entry["dtype"]], tuple(entry["shape"]), start + first)
        if first < 0 or held.size != last - first or start + last > end:
            raise FaspGraphError(f"{path} is cut short or damaged at {name} · help: fetch it again")
        found[name] = held
    return found


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the numbers start."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, HEADER_LIMIT)))
    except (OSError, ValueError) as error:
        raise FaspGraphError(
            f"{path} is no readable safetensors file: {error} · help: fetch it again"
        ) from error
    if not isinstance(header, dict):
        raise FaspGraphError(f"{path} is no safetensors file · help: fetch it again")
    return header, 8 + length


def metadata(path: Path) -> dict[str, str]:
    """What the file says of itself."""
    return dict(_header(path)[0].get("__metadata__", {}))


def folder_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder's model.safetensors, or of all its shards."""
    index = folder / INDEX
    paths = [folder / "model.safetensors"]
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / Path(name).name for name in sorted(set(listed))]
    missing = next((path for path in paths if not path.is_file()), None)
    if missing is not None:
        raise FaspGraphError(
            f"{missing} is not there · help: streaming reads safetensors only; save the model "
            "with save_pretrained first"
        )
    return {name: held for path in paths for name, held in stored(path).items()}


def write_shard(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write tensors, holding one at a time; wide types first, so that all are aligned."""
    header: dict[str, Any] = {"__metadata__": dict(about)}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    start = 0
    for name, tensor in ordered:
        stop = start + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # numbers start at a multiple of 8
    with path.open("wb", buffering=0) as file:
        _put(file, len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            held = materialized(tensor).detach().cpu().contiguous()
            if held.numel():
                _put(file, held.reshape(-1).view(torch.uint8).numpy())
        os.fsync(file.fileno())


def _put(file: Any, content: Any) -> None:
    """One call may write less than all."""
    view = memoryview(content)
    while len(view):
        view = view[file.write(view) :]
