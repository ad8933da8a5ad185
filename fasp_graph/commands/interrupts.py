"""What an interrupted command leaves behind, told in one line."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..scale.journal import work_folder
from .terminal import said


def interruptible(command: Callable[..., None]) -> Callable[..., None]:
    """`command`; at Ctrl-C it says what became of its `output`, and what to do."""

    @functools.wraps(command)
    def called(**given: Any) -> None:
        output = given.get("output")
        before = _stamp(output)
        try:
            command(**given)
        except KeyboardInterrupt:
            told = ["interrupted"]
            if output is not None:
                written = "nothing was" if _stamp(output) == before else "something was"
                told.append(f"{written} written to {output}")
            if output is not None and given.get("resume") and work_folder(output).is_dir():
                work = os.path.relpath(work_folder(output))
                told.append(f"run the same command to go on from {work}, or delete {work}")
            said(" · ".join(told))
            raise

    return called


def _stamp(path: Path | None) -> Any:
    """Which file or folder lies there; a folder that is replaced is another one."""
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
