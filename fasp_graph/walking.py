"""walking: the walk of `decide`, and what happens at its stops: choose, repair, go on.

At the first consumer of each group its units are chosen. Every consumer is repaired with the inputs
of the model as pruned so far, and the walk goes on with the new weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node

from passes.capture import Args
from passes.consumers import offset_of, staying, unit_columns
from passes.cost import Cost
from passes.couple import Group
from passes.drift import Twin, drift, twin
from passes.eliminate import Problem, eliminate
from passes.errors import where
from passes.experts import ExpertView, Orders, moved
from passes.gates import behind, level
from passes.lazy import Lazy, materialized
from passes.observe import Moments, Walk, probe, walk
from passes.pieces import with_every_piece
from passes.rewrite import attribute
from passes.rotate import columns_of, turns
from passes.score import GREEDY, NEEDS_DATA
from passes.select import Budget, select
from passes.unchanged import moved as moved_weight
from passes.views import View

from .calibration import solving
from .correction import beside, corrected
from .experts import settle_experts, weight_orders
from .refit import Turn, cut, folds, refit, whole
from .scale.devices import bounds
from .scale.distributed import room, share
from .scale.journal import Journal, watch
from .worth import Job, Progress, basis_of, problems_of, told, utility_of, weight_utility


@dataclass
class Decisions:
    """Filled group by group. `cost`: what the budget counts; `curves[name][k]`: error of removing k
    units per block; `seen`: tokens and channels at each consumer's weight that is solved for;
    `untold`: tokens at each of which calibration says nothing, and where it stands; `ridges`: those
    that were chosen on held-out tokens, of a weight or of each expert's; `scores`: medians of the
    units that stay and of those that go; `orders`: groups of which each expert keeps its own units,
    put in front (passes/experts.py); `rotated`: groups whose units are of another basis
    (passes/rotate.py); `distances`: how far the outputs were from the dense ones before and after
    each step of restore=outputs, of what it was before (passes/correct.py); `forward_passes`: what
    deciding cost, in plain forward passes over the calibration batches; `notes`: what was done
    otherwise than asked for, and why.
    """

    budget: Budget
    cost: Cost
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    untold: dict[str, tuple[int, str]] = field(default_factory=dict)
    ridges: dict[str, tuple[float, ...]] = field(default_factory=dict)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    curves: dict[str, tuple[float, ...]] = field(default_factory=dict)
    orders: Orders = field(default_factory=dict)
    rotated: frozenset[str] = frozenset()
    distances: tuple[float, ...] = ()
    forward_passes: float = 0.0
    notes: tuple[str, ...] = ()


def settle_all(
    job: Job,
    groups: list[Group],
    batches: list[Args],
    decided: Decisions,
    progress: Progress | None = None,
    journal: Journal | None = None,
) -> None:
    """Fill `decided` by one walk over the batches; each process walks over its share of them."""
    module, config = job.captured.graph_module, job.config
    stops, own = _Stops(job, decided), share(batches)
    for group in groups:
        stops.add(group, bool(batches))
    if stops.pending and beside(config, job.views):
        stops.dense = twin(module, own, room(*bounds(module, config)))
    report = (lambda done, total: progress("prune", done, total)) if progress else None
    visit, nodes = watch(journal, stops.visit, decided), stops.nodes
    given, inside = own if nodes else [], room(*bounds(module, config))
    decided.weights = walk(module, given, nodes, visit, report, inside, stops.again, stops.shut)
    _turn(job, groups, decided)
    if stops.pending and config.passes.restore == "outputs":
        found = corrected(
            module, groups, job.views, decided.kept, decided.weights, batches, stops.dense
        )
        if found is not None:
            decided.weights |= found.weights
            decided.distances = found.distances
    for gate in (gate for several in job.gates.values() for gate in several):
        decided.weights.pop(gate.name, None)
    _put_in_order(job, groups, decided)


@dataclass
class _Stops:
    """Where the walk stops, and what it does there. `again`: nodes to run once more after a stop;
    `shut`: gates of the groups that are decided before the walk begins.
    """

    job: Job
    decided: Decisions
    pending: dict[Node, list[tuple[Group, View]]] = field(default_factory=dict)
    routed: dict[Node, list[tuple[Group, ExpertView]]] = field(default_factory=dict)
    again: dict[Node, list[Node]] = field(default_factory=dict)
    shut: dict[str, Tensor] = field(default_factory=dict)
    dense: Twin | None = None

    @property
    def nodes(self) -> set[Node]:
        """All stops."""
        return {*self.pending, *self.routed}

    def add(self, group: Group, data: bool) -> None:
        """Stop where the group is consumed; without such a place or data, decide by weights."""
        job, decided = self.job, self.decided
        keep, inside = decided.budget.keep[group.name], job.experts.get(group.name)
        several, module = job.views[group.name], job.captured.graph_module
        if group.name in job.experts:
            decided.kept[group.name] = tuple(range(keep))
        if several and data:
            for view in several:
                self.pending.setdefault(view.node, []).append((group, view))
            behind_gates = behind(module, job.gates.get(group.name, ()), several[0].node)
            self.again.setdefault(several[0].node, []).extend(behind_gates)
        elif inside is not None and data:
            self.routed.setdefault(inside.node, []).append((group, inside))
            self.again.setdefault(inside.node, []).extend(inside.picks)
        elif group.name in job.experts:
            decided.orders[group.name] = weight_orders(job, group, keep)
        else:
            utility = weight_utility(module, group, job.config.passes.score, job.generator)
            _select(group, utility, decided)
            self.shut |= _shut(job, group, decided, self.shut)

    def visit(self, state: Walk, node: Node) -> None:
        """Choose, repair; then close the gates of what was chosen."""
        job, decided, here = self.job, self.decided, self.pending.get(node, ())
        for group, inside in self.routed.get(node, ()):
            found = settle_experts(job, group, inside, state, len(decided.kept[group.name]))
            decided.orders[group.name], decided.errors[group.name] = found.orders, found.errors
            decided.ridges |= {inside.parameter: found.ridges} if found.ridges else {}
            decided.untold |= {
                f"{inside.parameter}[{expert}]": (tokens, where(node))
                for expert, tokens in found.untold.items()
            }
            if solving(job.config) and found.seen[0]:
                decided.seen[inside.parameter] = found.seen
        parts = {v: [state.moments(v, part) for part in folds(job.config)] for _, v in here}
        moments = {view: whole(held) for view, held in parts.items()}
        chosen = [(group, view) for group, view in here if group.name not in decided.kept]
        for group, view in chosen:
            _choose(job, group, view, moments[view], state, decided)
        for place, (group, view) in enumerate(here):
            cut_before = [g for g, v in here[:place] if v == view]
            _repair(job, group, view, parts[view], state, self.dense, decided, cut_before)
        counted = [(group, view) for group, view in chosen if group.name in job.gates]
        for group, _ in counted:
            state.weights |= _shut(job, group, decided, state.weights)
        state.run(self.again[node] if counted else ())
        for view in {view: None for _, view in counted}:
            level(view, moments[view], state)


def _shut(
    job: Job, group: Group, decided: Decisions, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The group's gates without what it removes."""
    kept, found = decided.kept[group.name], {}
    for gate in job.gates.get(group.name, ()):
        now = weights.get(gate.name, attribute(job.captured.graph_module, gate.name))
        found[gate.name] = now & gate.closed(job.deps, group, kept).to(now.device)
    return found


def turn_of(group: Group) -> str:
    """The name under which a walk holds the group's Q (passes/rotate.py): no parameter's."""
    return f"Q of {group.name}"


def _turn(job: Job, groups: list[Group], decided: Decisions) -> None:
    """Producers and consumers of the groups that turned, in the basis that their units are of. Up
    to here consumers took their inputs in the old one.
    """
    names = {turn_of(group): group.name for group in groups}
    found = {names[n]: decided.weights.pop(n) for n in list(decided.weights) if n in names}
    decided.rotated = frozenset(found)
    state = Walk(job.captured.graph_module, [], decided.weights)
    for name, move in turns(groups, {n: materialized(q) for n, q in found.items()}).items():
        held = state.held(name).detach()
        decided.weights[name] = moved_weight(held, move) if isinstance(held, Lazy) else move(held)


def _put_in_order(job: Job, groups: list[Group], decided: Decisions) -> None:
    """What each expert keeps goes in front, so that all of them keep the same positions."""
    state = Walk(job.captured.graph_module, [], decided.weights)
    for name, move in moved(groups, decided.orders).items():
        decided.weights[name] = move(state.held(name).detach())


def _choose(
    job: Job, group: Group, first: View, here: Moments, state: Walk, decided: Decisions
) -> None:
    """The units that stay. Consumers of which the data tell nothing have no say; where none tells,
    weights decide.
    """
    scoring, module = job.config.passes.score, job.captured.graph_module
    moments = _judged_on(job, group, first, here, state)
    if scoring in NEEDS_DATA:
        moments = told(job, group, moments, state)
    if not moments:
        _select(group, weight_utility(module, group, scoring, job.generator), decided)
        return
    own = None
    if scoring in GREEDY or group.name in job.rotatable:
        problems = problems_of(job, group, moments, state)
        own = basis_of(job, group, problems)
    if scoring in GREEDY:
        problems = [own.problem(held) for held in problems] if own else problems
        decided.kept[group.name] = _left(group, problems, decided.budget.keep[group.name])
    else:
        _select(group, own.worth if own else utility_of(job, group, moments, state), decided)
    if own:
        state.weights[turn_of(group)] = own.orthogonal(decided.kept[group.name])


def _left(group: Group, problems: list[Problem], keep: int) -> tuple[int, ...]:
    """The units that greedy elimination leaves, `keep` in each block."""
    gone = eliminate(problems, group.block_of.tolist(), group.size // group.blocks - keep).order
    worth = dict.fromkeys(range(group.size), len(gone)) | {u: k for k, u in enumerate(gone)}
    stay = [unit for unit in range(group.size) if worth[unit] == len(gone)]
    return with_every_piece(group, stay, [float(worth[u]) for u in range(group.size)])


def _judged_on(
    job: Job, group: Group, first: View, here: Moments, state: Walk
) -> dict[str, Moments]:
    """Of several consumers those behind the first have not been run: they are judged on the dense
    model where it was sensed and that tells something, else by running ahead.
    """
    several = job.views[group.name]
    if len(several) == 1:
        return {first.node.name: here}
    sensed = {v.node.name: job.sensed[v.node.name].moments for v in several if job.sensed}
    return sensed if told(job, group, sensed, state) else probe(state, first.node, several)


def _select(group: Group, utility: Tensor, decided: Decisions) -> None:
    """The units of greatest utility stay."""
    kept = select(group, utility, decided.budget.keep[group.name])
    stays = torch.zeros(group.size, dtype=torch.bool)
    stays[list(kept)] = True
    parts = (utility.cpu()[stays], utility.cpu()[~stays])
    medians = [float(part.median()) if len(part) else math.nan for part in parts]
    decided.kept[group.name], decided.scores[group.name] = kept, (medians[0], medians[1])


def _repair(
    job: Job,
    group: Group,
    view: View,
    parts: list[Moments],
    state: Walk,
    dense: Twin | None,
    decided: Decisions,
    cut_before: Sequence[Group] = (),
) -> None:
    """Refit one consumer, unless the data tell nothing of the group there. A weight with several
    uses is fitted to the first: not towards the dense path, which differs from use to use. What
    groups in `cut_before` took off the same weight gets nothing back.
    """
    several, method = job.views[group.name], job.config.passes.restore
    weight = state.weight(view.parameter).detach()
    unit = unit_columns(group, view, weight)
    mask = staying(group, decided.kept[group.name], unit)
    for other in cut_before:
        mask &= staying(other, decided.kept[other.name], unit_columns(other, view, weight))
    maps = state.weight(turn_of(group)) if turn_of(group) in state.weights else None
    turn = None if maps is None else Turn(maps, columns_of(group, unit))
    found = whole(parts)
    if not found.tell(unit >= 0):
        place = view.parameter if not found.tokens else _columns(group, view, unit)
        decided.untold[place] = (found.tokens, where(view.node))
        state.weights[view.parameter] = view.weight(cut(view.matrix(weight), mask, turn), weight)
        return
    gap = None
    if dense is not None and sum(view.parameter == v.parameter for v in several) == 1:
        gap = drift(state, dense, view, method != "asymmetric")
    if solving(job.config):
        decided.seen.setdefault(view.parameter, (found.tokens, len(found.gram)))
    offset = offset_of(view)
    bias = offset.read(state.weight(offset.name).detach()) if offset else None
    result, ridges = refit(job.config, view.matrix(weight), bias, parts, mask, gap, turn)
    state.weights[view.parameter] = view.weight(result.weight, weight)
    decided.ridges |= {view.parameter: ridges} if ridges else {}
    if offset and result.bias is not None:
        state.weights[offset.name] = offset.read(result.bias)
    before, after = decided.errors.get(group.name, (0.0, 0.0))
    decided.errors[group.name] = (
        before + result.error_before / len(several),
        after + result.error_after / len(several),
    )


def _columns(group: Group, view: View, unit: Tensor) -> str:
    """The group's columns of a weight, in words."""
    whole = bool((unit >= 0).all())
    return view.parameter if whole else f"the columns of {group.name} in {view.parameter}"
