"""distributed: several processes walk, each over its share of the calibration batches.

    rank r takes batches r, r + world, ...;   G = sum over ranks of G_r,   likewise means, counts,
    sensitivities, drifts, distances and their gradients

An all-reduce gives every rank the same bits, so all make the same choices and repairs; rank 0
writes. All ranks sum as often, whatever batches they have. Started by torchrun; torch.distributed
must be initialised (`joined` does it).
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from passes.errors import CalibrationError, FaspGraphError
from passes.room import Room, Settle

PATIENCE = datetime.timedelta(minutes=30)
T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, processes); (0, 1) outside torchrun."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share(batches: Sequence[T]) -> Sequence[T]:
    """This rank's batches; of few there may be none."""
    rank, size = world()
    return batches[rank::size]


def refuse_idle(batches: Sequence[Any]) -> None:
    """CalibrationError, on every rank alike, if one would have nothing to walk over."""
    size = world()[1]
    if len(batches) < size:
        raise CalibrationError(
            f"{len(batches)} calibration batches cannot be shared by {size} processes · help: "
            "start fewer processes, or give smaller batches"
        )


def room(
    settle: Settle | None = None,
    devices: tuple[torch.device, ...] = (),
) -> Room:
    """Where all ranks walk together, each over its share."""
    return Room(total, settle, *world(), devices)


def total(value: Tensor) -> Tensor:
    """The sum over all ranks, perhaps in place."""
    if world()[1] == 1:
        return value
    held = value.cuda() if dist.get_backend() == "nccl" else value  # which takes no others
    try:
        dist.all_reduce(held)
    except RuntimeError as error:
        raise FaspGraphError(
            f"rank {world()[0]} lost another process while statistics were summed: "
            f"{str(error).splitlines()[0][:200]} · nothing was written · help: look for the first "
            "error of the other ranks, and run again; with the same work folder (or --output) the "
            "run goes on from the last finished group"
        ) from error
    return held.to(value.device)


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
