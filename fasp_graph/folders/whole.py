"""A folder appears whole or not at all, whenever the process that writes it dies.

    draft = .NAME.HEX beside NAME, mode 0700, locked by its writer
    written, flushed, then exchanged with NAME in one step (renameat2 with RENAME_EXCHANGE)

The lock goes with its process, so a draft that can be locked has no writer any more: the next
writer of the same folder removes it. Where a system cannot exchange two names, the old folder is
moved aside first, and a kill between the two steps leaves it as .NAME.HEX.old.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import safetensors

from passes.errors import FaspGraphError

try:
    import fcntl
except ImportError:  # not a POSIX system: drafts are not locked, and none is swept away
    fcntl = None  # type: ignore[assignment]

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of linux/fs.h
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Yield a draft to fill; it becomes `target` if the block ends well, else it is removed.

    FaspGraphError where the system refuses: a full disk, a folder that cannot be written to.
    """
    draft, lock = None, -1
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        draft, lock = _draft(target)
        yield draft
        os.chmod(draft, 0o777 & ~umask())
        for path in (*draft.rglob("*"), draft):
            _flush(path)
        _become(draft, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise FaspGraphError(
            f"{target} cannot be written: {error} · nothing of it is left behind, and a folder "
            "that was there is as it was · help: choose a folder with room, in which you may write"
        ) from error
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
            _unlock(lock)


def _draft(target: Path) -> tuple[Path, int]:
    """A new private folder beside `target`, and the handle that holds its lock."""
    while True:
        draft = target.parent / f".{target.name}.{uuid.uuid4().hex}"
        draft.mkdir(mode=0o700)
        lock = -1
        with contextlib.suppress(OSError):  # a file system without locks; then none is swept
            lock = _lock(draft, wait=True) if fcntl else -1
        if draft.exists():
            return draft, lock
        _unlock(lock)  # another writer swept it away before it was locked


def _sweep(target: Path) -> None:
    """Remove the drafts of writers that have died."""
    pattern = re.compile(re.escape(f".{target.name}.") + "[0-9a-f]{32}")
    for path in target.parent.iterdir() if fcntl else ():
        if not pattern.fullmatch(path.name) or path.is_symlink():
            continue
        with contextlib.suppress(OSError):  # a writer holds it, or has just removed it
            lock = _lock(path, wait=False)
            shutil.rmtree(path, ignore_errors=True)
            _unlock(lock)


def _lock(path: Path, wait: bool) -> int:
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


def _unlock(handle: int) -> None:
    if handle >= 0:
        os.close(handle)


def _become(draft: Path, target: Path) -> None:
    """`draft` becomes `target`; what was there is then at the draft's name, to be removed."""
    while True:
        try:
            _exchange(draft, target)
            break
        except OSError as error:
            if error.errno in _NO_EXCHANGE:
                _replace(draft, target)
                break
            if error.errno != errno.ENOENT:
                raise
        try:
            os.rename(draft, target)
            break
        except OSError as error:  # another writer was faster: its folder is exchanged now
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    _flush(target.parent)


def _exchange(draft: Path, target: Path) -> None:
    """Each gets the other's name in one step; OSError with ENOENT if there is no target."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    names = os.fsencode(draft), os.fsencode(target)
    if libc.renameat2(_HERE, names[0], _HERE, names[1], _EXCHANGE):  # type: ignore[union-attr]
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(target))


def _replace(draft: Path, target: Path) -> None:
    """In two steps; the old folder comes back if the second fails."""
    old = draft.with_name(f"{draft.name}.old")
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(draft, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def umask() -> int:
    """The process's umask."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
