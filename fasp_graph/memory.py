"""memory: the most that this process held since the last `restart`, in bytes.

host   resident memory: VmHWM on Linux; elsewhere ru_maxrss, which cannot be set back and so may
       be of an earlier time; None where the system counts neither
cuda   torch's allocator, summed over the GPUs; None without one, or where nothing was allocated
"""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

import torch


def restart() -> None:
    """Make the peaks the present sizes, where the system can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)


def peak_host() -> int | None:
    """Not getrusage on Linux: there a child starts with its parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.M)):
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def peak_cuda() -> int | None:
    """The sum over devices of each one's peak."""
    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):
        return None
    devices = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(device) for device in devices) or None
