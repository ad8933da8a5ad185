"""Report: what a pruning run did, measured; `to_dict` is JSON-able, `to_text` fits a terminal."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from .units import counted, in_bytes

_LISTS = ("groups", "frozen", "notes", "distances")


@dataclass(frozen=True)
class GroupReport:
    """One pruned group: units before and kept (equally many of each of its `blocks`), relative
    squared output error of its consumers, and how it was emitted. `curve[k]`: predicted error of
    removing k units per block, in the unit of the allocation (passes/allocate.py); empty for
    uniform allocation. `score_kept`, `score_removed`: medians of the units that stayed and that
    went; NaN where units went one after the other (obs, rotation). `rotated`: its units are not
    channels of the dense model but combinations of a block's (passes/rotate.py).
    """

    name: str
    kind: str
    units: int
    kept: int
    error_before: float
    error_after: float
    emitted: str
    curve: tuple[float, ...] = ()
    score_kept: float = math.nan
    score_removed: float = math.nan
    blocks: int = 1
    rotated: bool = False


@dataclass(frozen=True)
class Frozen:
    """A group that was not pruned, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Report:
    """Sizes in parameters, bytes and floating-point operations of one forward pass at the
    example inputs, whose shapes `inputs` tells. `sparsity`: the removed share of the parameters in
    scope (passes/select.py). `forward_passes`: what deciding cost, in plain forward passes over the
    calibration batches (a backward pass counts as two). `notes`: what the user should know of
    this run, each with a way out. `peak_memory`: bytes of resident memory
    that the process held at most during the run, all that was there before included;
    `peak_memory_cuda`: the allocator's peak, None without a GPU (fasp_graph/memory.py).
    `layer_seconds_before`, `layer_seconds_after`: with budget="latency" what the ops of the layers
    in scope take for one calibration batch, as the plan counts it (fasp_graph/pricing.py).
    `distances`: how far the outputs were from the dense model's before the steps of all layers and
    after each, as shares of the first, on calibration that no step was fitted to; empty where none
    was tried (passes/correct.py). `ridges`: with ridge="held-out" those that were chosen, of a
    weight or of each expert's.
    """

    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int
    sparsity: float
    seconds: dict[str, float]
    groups: tuple[GroupReport, ...]
    verify_max_error: float
    frozen: tuple[Frozen, ...]
    forward_passes: float = 0.0
    notes: tuple[str, ...] = ()
    peak_memory: int | None = None
    peak_memory_cuda: int | None = None
    inputs: str = ""
    layer_seconds_before: float | None = None
    layer_seconds_after: float | None = None
    distances: tuple[float, ...] = ()
    ridges: dict[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def removed(self) -> float:
        """The removed share of all parameters."""
        return 1 - self.params_after / self.params_before

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; tuples become lists."""
        found = {**asdict(self), "removed": self.removed}
        return {**found, **{key: list(found[key]) for key in _LISTS}}

    def to_text(self) -> str:
        """A short summary in words."""
        kept = sum(group.kept for group in self.groups)
        units = sum(group.units for group in self.groups)
        keep = "keeps" if len(self.groups) == 1 else "keep"
        several = "" if self.forward_passes == 1 else "es"
        forward = f"{self.forward_passes:.3g} forward pass{several}"
        return (
            f"parameters {self.params_before:,} -> {self.params_after:,}, "
            f"{self.removed:.1%} of all and {self.sparsity:.1%} of those in scope removed\n"
            f"weights {in_bytes(self.bytes_before)} -> {in_bytes(self.bytes_after)}\n"
            f"FLOPs {self.flops_before:,} -> {self.flops_after:,} at {self.inputs}\n"
            f"{self._times()}"
            f"{counted(len(self.groups), 'group')} {keep} {kept:,} of {counted(units, 'unit')}"
            f"{self._rotated()}\n"
            f"{self._left_alone()}\n"
            f"verified to {self.verify_max_error:.1e}, {forward}, "
            f"{sum(self.seconds.values()):.1f} s{self._stages()}{self._memory()}{self._steps()}"
            f"{self._ridges()}"
        )

    def _steps(self) -> str:
        """A line of the steps of all layers, where any were tried."""
        said = " -> ".join(f"{share:.3g}" for share in self.distances)
        return f"\nsteps of all layers, distance from the dense outputs: {said}" if said else ""

    def _ridges(self) -> str:
        """A line of the ridges, where they were chosen."""
        held = [ridge for several in self.ridges.values() for ridge in several]
        if not held:
            return ""
        low, middle, high = (f"{ridge:.0e}" for ridge in (min(held), median(held), max(held)))
        of = counted(len(held), "matrix", "matrices")
        return f"\nridges by held-out tokens: {low} to {high}, in the middle {middle}, of {of}"

    def _times(self) -> str:
        """A line of the measured budget, where there was one."""
        before, after = self.layer_seconds_before, self.layer_seconds_after
        if before is None or after is None:
            return ""
        return (
            f"layers in scope {1e3 * before:.4g} ms -> {1e3 * after:.4g} ms for one calibration "
            f"batch, each op by itself: {1 - after / before:.1%} removed\n"
        )

    def _rotated(self) -> str:
        turned = sum(group.rotated for group in self.groups)
        return f", {turned} of them in a basis of their own" if turned else ""

    def _left_alone(self) -> str:
        """How many groups stayed as they are, by kind and reason; of a reason its first part."""
        reasons = Counter((held.kind, held.reason.split(" · ")[0]) for held in self.frozen)
        told = ", ".join(f"{n} {kind} ({why})" for (kind, why), n in reasons.most_common())
        more = f": {told}; fasp-graph inspect MODEL --frozen tells where" if told else ""
        were = "was" if len(self.frozen) == 1 else "were"
        return f"{counted(len(self.frozen), 'group')} {were} left alone{more}"

    def _stages(self) -> str:
        told = ", ".join(f"{stage} {held:.1f}" for stage, held in self.seconds.items())
        return f" ({told})" if told else ""

    def _memory(self) -> str:
        named = ((self.peak_memory, "memory"), (self.peak_memory_cuda, "GPU memory"))
        return "".join(f", {in_bytes(held)} of {name} at most" for held, name in named if held)
