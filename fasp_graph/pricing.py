"""pricing: budget="latency": what the ops of the layers in scope cost, in seconds on this machine.

Every op that reads a parameter in scope runs by itself, at the sizes of the first calibration batch
(as max_memory cuts it; of the example inputs, where the method takes no data): whole, and at up to
POINTS counts of each group that cuts it. One forward pass of that batch tells the sizes; what is
timed reads random numbers.

Ops that say the same take one measurement (passes/alone.py): a model of equal layers costs as much
as one of them. Between the counts times are linear, and they never fall where more is kept. What
two groups take off one op multiplies (passes/cost.py).

Times differ from run to run, and so may the plan. A run with a journal keeps them in it, and goes
on with them after an interruption. Of several processes the first one measures.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from passes.alone import Call, Pool, Timed, timed
from passes.capture import Args, Captured
from passes.cost import Cost, Item, Lost, isotonic
from passes.errors import BudgetError, UnsupportedOp
from passes.groups import DependencyGraph, Group
from passes.removal import removal
from passes.room import Room
from passes.select import Plan, least, select, steps

from .config import Config
from .scale.devices import bounds
from .scale.distributed import total, world
from .scale.journal import Journal
from .scale.microbatch import microbatches
from .timing import latency

POINTS = 9  # counts of a group at which its ops are run
REPEATS = 11
SHORT = 1e-3  # seconds; a shorter call is repeated until it lasts as long
Times = dict[str, float]


def measured_cost(
    captured: Captured,
    deps: DependencyGraph,
    groups: list[Group],
    batches: Sequence[Args],
    config: Config,
    journal: Journal | None = None,
) -> Cost:
    """Seconds of the ops of the layers in scope; BudgetError if none can be timed."""
    given = list(batches[:1]) or [captured.inputs]
    batch = microbatches(captured, given, config.max_memory)[0]
    settle, devices = bounds(captured.graph_module, config)
    room = Room(settle=settle, devices=devices)
    sheet = _Sheet(timed(captured.graph_module, deps, batch, room))
    sheet.fill(captured, deps, groups, config)
    measure = functools.partial(_on_one_rank, sheet.calls)
    times = journal.once("times", measure) if journal else measure()
    items, untimed = sheet.items(times), sheet.untimed(times)
    if not items:
        raise BudgetError(
            "no op of the layers in scope can be timed by itself · help: budget='parameters'"
        )
    return Cost(items, sum(item.size for item in items), measured=True, untimed=untimed)


@dataclass
class _Sheet:
    """What is to be measured. `calls`: each once, by what it says; `whole[n]`: what op n says;
    `points[n]`: of each group that cuts op n its factor, its counts and what op n says there.
    """

    ops: list[Timed]
    calls: dict[str, Call] = field(default_factory=dict)
    whole: list[str] = field(default_factory=list)
    points: list[list[tuple[str, tuple[int, int], dict[int, str]]]] = field(default_factory=list)

    def fill(
        self, captured: Captured, deps: DependencyGraph, groups: list[Group], config: Config
    ) -> None:
        """All ops whole, then at the counts of each group."""
        module, nothing = captured.graph_module, removal(deps, {})
        self.whole = [self._add(op.call(module, nothing)) for op in self.ops]
        self.points = [[] for _ in self.ops]
        multiple = steps(deps, groups, config.align)
        for group in groups:
            factors = {n: f for n, op in enumerate(self.ops) if (f := _factor(group, op, deps))}
            said: dict[int, dict[int, str]] = {n: {} for n in factors}
            for keep in counts(group, multiple[group.name], config.min_keep):
                cut = removal(deps, {group.name: select(group, torch.ones(group.size), keep)})
                for n in factors:
                    try:
                        said[n][keep] = self._add(self.ops[n].call(module, cut))
                    except UnsupportedOp:  # the rewriter refuses this count
                        continue
            for n, factor in factors.items():
                self.points[n].append((group.name, factor, said[n]))

    def _add(self, call: Call) -> str:
        return self.calls.setdefault(call.told, call).told

    def items(self, times: Times) -> tuple[Item, ...]:
        """With the measured times; an op that does not run by itself is left out."""
        return tuple(
            Item(times[whole], tuple(_lost(*point, times) for point in points))
            for whole, points in zip(self.whole, self.points, strict=True)
            if math.isfinite(times[whole])
        )

    def untimed(self, times: Times) -> tuple[str, ...]:
        """A weight of each op that does not run by itself."""
        pairs = zip(self.whole, self.ops, strict=True)
        return tuple(op.weights[0] for whole, op in pairs if not math.isfinite(times[whole]))


def counts(group: Group, step: int, min_keep: int) -> list[int]:
    """Counts per block from the least to all: evenly spaced, of those that may be kept."""
    size, low = group.size // group.blocks, least(group, min_keep)
    allowed = [k for k in range(low, size + 1) if k % step == 0 or k == size]
    places = np.linspace(0, len(allowed) - 1, min(POINTS, len(allowed))).round().astype(int)
    return [allowed[place] for place in places]


def _factor(group: Group, op: Timed, deps: DependencyGraph) -> tuple[int, int] | None:
    """Where a group cuts an op: the dim of its largest weight; None if it does not."""
    mine = [member for member in group.members if member.parameter in op.weights]
    if not mine:
        return None
    first = max(mine, key=lambda member: len(deps.parameters[member.parameter]))
    return first.dim, group.layer


def _lost(group: str, factor: tuple[int, int], said: Mapping[int, str], times: Times) -> Lost:
    """What goes at each count: of times that never fall where more is kept."""
    known = [keep for keep, told in said.items() if math.isfinite(times[told])]
    rising = isotonic([times[said[keep]] for keep in known])
    return Lost(group, factor, tuple(known), tuple(1 - t / rising[-1] for t in rising))


def layer_seconds(
    deps: DependencyGraph, plan: Plan, cost: Cost
) -> tuple[float | None, float | None]:
    """What the ops of the layers in scope cost before and after; None where parameters count."""
    if not cost.measured:
        return None, None
    keep = {name: len(units) // deps[name].blocks for name, units in plan.kept.items()}
    return cost.total, cost.total * (1 - cost.removed(keep))


def _on_one_rank(calls: Mapping[str, Call]) -> Times:
    """The times that the first process measures, on all of them."""
    measured = seconds(calls) if world()[0] == 0 else dict.fromkeys(calls, 0.0)
    agreed = total(torch.tensor([*measured.values()], dtype=torch.float64))
    return dict(zip(calls, agreed.tolist(), strict=True))


def seconds(calls: Mapping[str, Call]) -> Times:
    """Median seconds of each call, runs alternating; NaN where it does not run by itself. On the
    processor its own seconds count, those of all threads: what else the machine does hardly shows
    in them.
    """
    pool: Pool = {}
    runs: dict[str, Callable[[], Any]] = {}
    for told, call in calls.items():
        try:
            run = call.start(pool)
            run()
        except Exception:  # an op may refuse random numbers in any way
            continue
        runs[told] = run
    if not runs:
        return dict.fromkeys(calls, math.nan)
    host = all(call.host for call in calls.values())
    clock = time.process_time if host else time.perf_counter
    once = latency(runs, repeats=2, warmup=1, clock=clock)
    number = {told: min(100, math.ceil(SHORT / max(once[told]["median"], 1e-9))) for told in runs}
    several = {told: _repeated(run, number[told]) for told, run in runs.items()}
    found = latency(several, REPEATS, warmup=1, clock=clock)
    return {t: found[t]["median"] / number[t] if t in runs else math.nan for t in calls}


def _repeated(run: Callable[[], Any], number: int) -> Callable[[], Any]:
    def repeat() -> None:
        for _ in range(number):
            run()

    return repeat
