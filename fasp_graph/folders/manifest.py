"""fasp_graph.json: what a folder holds, with the sha256 of what is read from it.

`weights`: the safetensors files; `settings`: configuration, tokenizer, processor. Reports and
the card have none: they may be edited. Older folders have no `settings`, and load unchecked.
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from passes.errors import FaspGraphError

from ..jsontext import read_object

FORMAT = 1
MANIFEST = "fasp_graph.json"
_PACKAGES = ("fasp-graph", "torch", "transformers", "safetensors")
_WANTED: dict[str, type] = {
    "weights": dict,
    "settings": dict,
    "aliases": dict,
    "emission": dict,
    "files": list,
}
AGAIN = "help: fetch the folder again"
_PLAIN = re.compile(r"(?!\.\.?$)[^/\\\x00]+")


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a folder, or an error that says what is wrong with it."""
    path = root / MANIFEST
    if not path.is_file():
        raise FaspGraphError(f"{root} holds no {MANIFEST} · help: give a folder written by save")
    manifest = {"settings": {}, **read_object(path)}
    version = manifest.get("format")
    if version != FORMAT:
        raise FaspGraphError(
            f"{path} has format {version!r}; this version reads {FORMAT} · help: update fasp-graph"
        )
    for key, kind in _WANTED.items():
        if not isinstance(manifest.get(key), kind):
            raise FaspGraphError(
                f"{path} is damaged: {key!r} is missing or of the wrong type · {AGAIN}"
            )
    for name in manifest["files"]:
        if not isinstance(name, str) or not _PLAIN.fullmatch(name):
            raise FaspGraphError(f"{path} lists {name!r}, which is not a plain file name · {AGAIN}")
    return manifest


def checked_files(root: Path, files: Mapping[str, Any]) -> list[Path]:
    """Paths of files, name -> sha256 in the manifest; their hashes have been checked."""
    found = []
    for name, expected in files.items():
        if not _PLAIN.fullmatch(name):
            raise FaspGraphError(f"{root / MANIFEST}: {name!r} is not a plain file name · {AGAIN}")
        path = root / name
        if not path.is_file():
            raise FaspGraphError(f"{path} is missing · {AGAIN}")
        if digest(path) != expected:
            raise FaspGraphError(
                f"{path} is not the file that was saved: its sha256 differs · help: fetch the "
                f"folder again; if you changed it on purpose, remove its line from {MANIFEST}"
            )
        found.append(path)
    return found


def digest(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a folder depends on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
