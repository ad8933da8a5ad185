"""drafts: files appear at their path complete and checked, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from passes.errors import FaspGraphError, causes
from passes.refuse import failed_at

from .whole import whole

MOST = 400  # characters of an exporter's words


@contextmanager
def draft(path: Path, kind: str, ending: str) -> Iterator[Path]:
    """A path in a temporary folder beside `path`. What lies in the folder when the block ends is
    moved beside `path`, the file of its name last; an exception leaves nothing behind, and becomes
    a FaspGraphError that says `kind`, and where in the model. `ending`: how files of this kind end.
    """
    if not path.parent.is_dir():
        raise FaspGraphError(f"the folder {path.parent} does not exist · help: create it first")
    if path.is_dir():
        raise FaspGraphError(f"{path} is a folder · help: give the path of a file")
    if path.suffix != ending:
        raise FaspGraphError(f"{path.name} must end in {ending} · help: {path.stem}{ending}")
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise FaspGraphError(
            f"{path.parent} cannot be written to: {error.strerror} · help: another folder"
        ) from error
    try:
        made = temporary / path.name
        yield made
        for file in sorted(temporary.iterdir(), key=lambda file: file == made):
            os.replace(file, path.parent / file.name)
    except FaspGraphError:
        raise
    except Exception as error:  # exporters raise errors of many unrelated types
        raise FaspGraphError(
            f"the graph cannot be written as {kind}: {causes(error, MOST)}{failed_at(error)} · "
            "help: another format may do"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """`whole` for a `path` that must not exist, or be an empty folder."""
    if not path.parent.is_dir():
        raise FaspGraphError(f"the folder {path.parent} does not exist · help: create it first")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FaspGraphError(f"{path} exists · help: name a new folder for the parts")
    with whole(path) as made:
        yield made
