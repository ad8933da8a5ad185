"""distributed: several processes walk, each over its share of the calibration batches.

    rank r takes batches r, r + world, ...;   G = sum over ranks of G_r,   likewise means and counts

An all-reduce gives every rank the same bits, so all make the same choices and repairs; rank 0
writes. Started by torchrun; torch.distributed must be initialised (`joined` does it).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from passes.errors import CalibrationError, FaspGraphError

PATIENCE = datetime.timedelta(minutes=30)
T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, processes); (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(batches: list[T]) -> list[T]:
    """This rank's batches; CalibrationError, on every rank alike, if one would have none."""
    rank, size = world()
    if len(batches) < size:
        raise CalibrationError(
            f"{len(batches)} calibration batches cannot be shared by {size} processes · help: "
            "start fewer processes, or give smaller batches"
        )
    return batches[rank::size]


def total(value: Tensor) -> Tensor:
    """The sum over all ranks."""
    if world()[1] == 1:
        return value
    try:
        dist.all_reduce(value)
    except RuntimeError as error:
        raise FaspGraphError(
            f"rank {world()[0]} lost another process while statistics were summed: "
            f"{str(error).splitlines()[0][:200]} · nothing was written · help: look for the first "
            "error of the other ranks, and run again; with the same work folder (or --output) the "
            "run goes on from the last finished group"
        ) from error
    return value


@contextmanager
def joined(patience: datetime.timedelta = PATIENCE) -> Iterator[None]:
    """Under torchrun: join the other processes, and leave in the end; not after an error, since
    leaving a group that has lost a process may abort this one before it has said so.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or world()[1] > 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=patience)
    well = False
    try:
        yield
        well = True
    except SystemExit as done:  # how a command line ends
        well = not done.code
        raise
    finally:
        if well:
            dist.destroy_process_group()
