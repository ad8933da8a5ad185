"""The zoo's models as they are read: captured and analysed once for all tests."""

from __future__ import annotations

import functools

import models_zoo
from fasp_graph.prune import Program, read
from models_zoo import Entry


@functools.cache
def program(name: str) -> tuple[Entry, Program]:
    """The entry and what was read of it, invariants checked; tests change copies."""
    entry = models_zoo.load(name)
    return entry, read(entry.model, entry.inputs, check=True)
