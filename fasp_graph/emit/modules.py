"""emit 2: the user's own class with smaller weights.

Weights are replaced by their compact form, then each group needs a way (emission.py, beside this
file) in which the class's own code computes the same as the compact graph. It is searched:

    all groups native?  ->  else, family by family:
    native, attributes (singly, then all, then in pairs), adapter, padded   ->  first that agrees

A family is the same group of every layer; if it has no common way, its groups are tried one by
one. What is not yet decided keeps its old size with zeros in place of removed units, which
computes the same, so each trial judges one family alone and their number is linear. A trial is
accepted only if its numbers equal the compact graph's at several inputs of several sizes that the
graph takes; the report names the sizes that it refuses. Trials are copies that share the weights;
the user's model is never touched.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.capture import Args
from passes.couple import DependencyGraph, Group
from passes.precision import is_half
from passes.rewrite import attribute
from passes.select import Plan
from passes.skeleton import shared_copy
from passes.tracing import silenced

from .cases import Case, apart, cases, same_when_wide
from .compaction import Compaction
from .current import share
from .emission import Emission, apply_shapes
from .recipes import ADAPTER, NATIVE, PADDED, WIDE, Way, record
from .sizes import attribute_sets

DEEP = 20  # times the usual rounding, which that of many layers in half precision may reach

__all__ = ["Emission", "apply_shapes", "emit_model"]


def emit_model(
    model: nn.Module,
    compact: GraphModule,
    deps: DependencyGraph,
    plan: Plan,
    inputs: Args,
    stand_in: Callable[[], tuple[nn.Module, GraphModule]] | None = None,
) -> tuple[nn.Module, Emission]:
    """A smaller copy of `model` whose outputs equal `compact`'s, and how it was made; `compact`
    stands on its storage from then on (current.py).

    `stand_in` makes the model and the compact graph with other numbers, on which ways are searched
    where those of `model` are slow to read; what is found is then judged on the true ones.
    """
    groups = tuple(g for g in deps.groups if g.name in plan.kept)
    search = _Search(Compaction(model, compact, groups, plan.kept), cases(compact, inputs))
    chosen = None if stand_in is None else _choose_on(*stand_in(), groups, plan, inputs)
    if chosen is None or not search.agrees(chosen):
        chosen = _choose(search)
    small, emission = compact, Emission(ways={g.name: "graph" for g in groups})
    if chosen is not None:
        small, emission = search.build(chosen)
        for path, module in model.named_modules():  # parents first; adapters are as their hosts
            for inner in small.get_submodule(path).modules():
                inner.training = module.training
    small = copy.deepcopy(small)
    share(compact, small)
    return small, emission


def _choose_on(
    model: nn.Module, compact: GraphModule, groups: tuple[Group, ...], plan: Plan, inputs: Args
) -> dict[str, Way] | None:
    return _choose(_Search(Compaction(model, compact, groups, plan.kept), cases(compact, inputs)))


def _choose(search: _Search) -> dict[str, Way] | None:
    """A way for each group, or None if some group has none."""
    native: dict[str, Way] = {group.name: NATIVE for group in search.weights.groups}
    if search.agrees(native):
        return native
    chosen: dict[str, Way] | None = {}
    if not search.agrees({}):
        chosen = _beyond_zeros(search)
    if chosen is None:
        return None
    families: dict[str, list[Group]] = {}
    for group in search.weights.groups:
        if group.name not in chosen:
            families.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    for family in families.values():
        found = _ways_of(search, family, chosen)
        if found is None:
            return None
        chosen |= found
    return chosen


def _beyond_zeros(search: _Search) -> dict[str, Way] | None:
    """A common way for the groups for which zeros do not stand, so that they cannot wait: a router
    may choose an expert of zeros; then all but chains, such as the residual stream.
    """
    groups = search.weights.groups
    routed = [g for g in groups if g.kind == "head" and not g.consumers]
    for family in (routed, [g for g in groups if g.kind not in ("chain", "bilinear")]):
        sets = attribute_sets(search.weights.model, family)
        for way in (NATIVE, *(("attributes", *names) for names in sets)):
            trial: dict[str, Way] = {group.name: way for group in family}
            if family and search.agrees(trial):
                return trial
    return None


def _ways_of(search: _Search, family: list[Group], chosen: dict[str, Way]) -> dict[str, Way] | None:
    """Ways for the groups of `family` on top of `chosen`: one for all, or each its own."""
    attributes = (("attributes", *names) for names in attribute_sets(search.weights.model, family))
    for way in itertools.chain([NATIVE], attributes, [ADAPTER, WIDE, PADDED]):
        trial = {group.name: way for group in family}
        if search.agrees(chosen | trial):
            return trial
    if len(family) == 1:
        return None
    found: dict[str, Way] = {}
    for group in family:
        one = _ways_of(search, [group], chosen | found)
        if one is None:
            return None
        found |= one
    return found


@dataclass(frozen=True)
class _Search:
    """What all trials share."""

    weights: Compaction
    cases: list[Case]

    def agrees(self, chosen: Mapping[str, Way]) -> bool:
        """The class's own code, each group its way, equals the compact graph."""
        try:
            trial, _ = self.build(chosen)
            with silenced():  # control flow ops are compiled, and may refuse a size
                return all(self._same(trial, args, expected) for args, expected in self.cases)
        except Exception as error:  # the class's code may fail in any way at a size it knows not
            if _out_of_memory(error):
                raise
            return False

    def _same(self, trial: nn.Module, args: Args, expected: list[Tensor]) -> bool:
        """In float32, where rounding of half precision alone could be what is between them."""
        gap = apart(trial, args, expected)
        if gap <= 1 or gap > DEEP or not is_half(trial):
            return gap <= 1
        return same_when_wide(trial, self.weights.compact, args)

    def build(self, chosen: Mapping[str, Way]) -> tuple[nn.Module, Emission]:
        """A trial that shares all weights, and its recipe; groups without a way keep their size."""
        emission = Emission(ways={g: way[0] for g, way in chosen.items()})
        weights = self.weights
        values = {name: weights.value(name, chosen) for name in weights.names}
        for name, value in values.items():
            if value.shape != attribute(weights.model, name).shape:
                emission.shapes[name] = tuple(value.shape)
        for group in weights.groups:
            if group.name in chosen:
                record(emission, weights, group, chosen)
        trial = shared_copy(weights.model, buffers=True).eval()  # cheap, never to be written to
        return apply_shapes(trial, emission, values), emission


def _out_of_memory(error: Exception) -> bool:
    """Says nothing of a way: another would fail likewise. torch has no class for it on the CPU."""
    named = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return named or "can't allocate memory" in str(error)
