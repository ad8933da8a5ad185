"""layout: can a model's configuration say the pruned shapes?

A configuration field says a set of groups if changing it alone, and building the class again,
shortens exactly the dims that the groups' members lie on, and each as if every group had lost the
same number of units. Whole blocks (heads with their KV heads) may need two fields in proportion,
and a class may refuse some counts. That is found by trying (on the meta device, where building is
cheap), not by a table of models. Where it holds and all groups of a field keep equally many units,
a plain `from_pretrained` loads the result.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from passes.cost import Cost
from passes.couple import DependencyGraph, Group
from passes.errors import BudgetError
from passes.select import Budget, allocate

from ..config import Config

Shapes = dict[str, tuple[int, ...]]
Field = tuple[str, ...]  # path of attributes from the configuration, through nested ones
Edits = dict[Field, int]


@dataclass(frozen=True)
class Said:
    """`fields`, changed together, say the size of all `groups`.

    `counts`: the units per block that the class accepts; None: any.
    """

    fields: tuple[Field, ...]
    groups: tuple[str, ...]
    counts: tuple[int, ...] | None = None


def said_by_fields(model: nn.Module, groups: Iterable[Group]) -> list[Said]:
    """What single fields of the model's configuration say, then what pairs of them say."""
    config = getattr(model, "config", None)
    search = _Fields(type(model), config, list(groups))
    if search.dense is None:
        return []
    found = [said for path, value in _integers(config) if (said := search.single(path, value))]
    blocks = [g for g in search.groups if g.layer and not any(g.name in s.groups for s in found)]
    left = dataclasses.replace(search, groups=blocks)
    return found + [s for size in sorted({g.size for g in blocks}) for s in left.pairs(size)]


@dataclass(frozen=True)
class _Fields:
    """The search for fields: the class is built at edited configurations, shapes are compared."""

    kind: Any
    config: Any
    groups: list[Group]

    @functools.cached_property
    def dense(self) -> Shapes | None:
        return _shapes(self.kind, self.config)

    def single(self, path: Field, value: int | None) -> Said | None:
        """One field: one less, half (or, where it is unset, one less than some group's units)."""
        units = sorted({g.size // g.blocks for g in self.groups})
        for trial in [value - 1, value // 2] if value else [n - 1 for n in units]:
            names = self.names({path: trial})
            blocks = {g.size for g in self.groups if g.name in names and g.layer} if names else ()
            if blocks and value:
                return self.counted((path,), (value,), min(blocks))
            if names:
                return Said((path,), names)
        return None

    def pairs(self, size: int) -> Iterator[Said]:
        """Two fields that hold multiples of a number of blocks, such as query and KV heads."""
        multiples = [(p, v) for p, v in _integers(self.config) if v and v % size == 0]
        for (one, first), (other, second) in itertools.combinations(multiples, 2):
            said = self.counted((one, other), (first, second), size)
            if said:
                yield said

    def counted(self, paths: tuple[Field, ...], values: tuple[int, ...], size: int) -> Said | None:
        """The fields in proportion, at every number of blocks below `size`."""
        groups: tuple[str, ...] = ()
        counts = [size]
        for count in range(size - 1, 0, -1):
            edits = dict(zip(paths, (value // size * count for value in values), strict=True))
            names = self.names(edits)
            if names == ():
                break
            if names and names == (groups or names):
                groups, counts = names, [*counts, count]
        return Said(paths, groups, tuple(counts)) if groups else None

    def names(self, edits: Edits) -> tuple[str, ...] | None:
        """Groups that explain every difference of shapes by one number of lost units: inside
        blocks, or whole blocks. None: the class cannot be built.
        """
        shapes = _shapes(self.kind, self.config, edits)
        if shapes is None or self.dense is None:
            return None
        moved = _wrong(shapes, self.dense) or set()
        for layer in (0, 1):
            inside = [g for g in self.groups if g.layer == layer and self.places(g) <= moved]
            if moved and _explained(self.dense, shapes, moved, inside):
                return tuple(g.name for g in inside)
        return ()

    def places(self, group: Group) -> set[tuple[str, int]]:
        """The stored weights' dims that the group lies on."""
        return {(m.parameter, m.dim) for m in group.members if m.parameter in (self.dense or ())}


def _explained(
    dense: Shapes, shapes: Shapes, moved: set[tuple[str, int]], groups: Iterable[Group]
) -> bool:
    per_unit: dict[tuple[str, int], int] = {}
    for member in (m for g in groups for m in g.members if m.parameter in dense):
        key = (member.parameter, member.dim)
        per_unit[key] = per_unit.get(key, 0) + len(member.indices[0])
    if per_unit.keys() != moved:
        return False
    lost = {divmod(dense[n][d] - shapes[n][d], per_unit[n, d]) for n, d in moved}
    return len(lost) == 1 and lost.pop()[1] == 0


def uniform_groups(model: nn.Module, groups: list[Group]) -> tuple[list[Group], list[Said]]:
    """The groups that the configuration can say, and which of them share fields. The class counts
    anew under a mean, so it can say no group there.
    """
    found = said_by_fields(model, [group for group in groups if not group.means])
    said = [g for g in groups if any(g.name in s.groups for s in found)]
    if not said:
        raise BudgetError(
            f"layout='uniform': no configuration field of {type(model).__name__} says the size of "
            "a group that can be pruned · help: layout='free'"
        )
    return said, found


def settled(
    deps: DependencyGraph,
    groups: list[Group],
    budget: Budget,
    shared: list[Said],
    config: Config,
    cost: Cost,
) -> Budget:
    """`budget` with equal counts where fields are shared; what rounding to whole heads took or left
    is made up for by the other groups, as far as they can.
    """
    even = _equalised(budget, shared)
    blocks = {n: even.keep[n] for s in shared if s.counts for n in s.groups if n in even.keep}
    if not 0 < len(blocks) < len(groups):
        return even
    try:
        again = allocate(
            deps, groups, config.sparsity, config.align, config.min_keep, blocks, cost=cost
        )
    except BudgetError:  # the others alone cannot: the plan states what was reached
        return even
    return _equalised(again, shared)


def _equalised(budget: Budget, shared: Iterable[Said]) -> Budget:
    """The same number of kept units in all groups that share fields: the mean, rounded to a
    number that the class accepts.
    """
    keep = dict(budget.keep)
    for said in shared:
        mine = [keep[name] for name in said.groups if name in keep]
        if mine:
            mean = sum(mine) / len(mine)
            count = min(said.counts or (round(mean),), key=lambda n: abs(n - mean))
            keep |= {name: count for name in said.groups if name in keep}
    return dataclasses.replace(budget, keep=keep)


def plain_config(small: nn.Module, changes: Iterable[tuple[int, int]]) -> Any:
    """A configuration with which the class has exactly `small`'s shapes, or None.

    `changes`: old and new sizes that occur. A field, or two in proportion, is set where that
    brings more shapes to what they must be and none away from it, until all are.
    """
    config, kind = getattr(small, "config", None), type(small)
    target, dense = _all_shapes(small), _shapes(kind, config) or {}
    grown = {n for n in target if n not in small.state_dict() and dense.get(n) != target[n]}
    target = {name: shape for name, shape in target.items() if name not in grown}
    edits: Edits = {}
    wrong = _wrong(dense, target, grown)
    pairs = list(changes)
    while wrong:
        free = [(path, value) for path, value in _integers(config) if path not in edits]
        for step in (*_steps(free, pairs, 1), *_steps(free, pairs, 2)):
            left = _wrong(_shapes(kind, config, edits | step), target, grown)
            if left is not None and left < wrong:
                edits, wrong = edits | step, left
                break
        else:
            return None
    return edited(config, edits) if wrong is not None else None


def _steps(
    free: list[tuple[Field, int | None]], pairs: list[tuple[int, int]], count: int
) -> Iterator[Edits]:
    """`count` fields at a time: an old size, or a multiple of it, becomes the new one."""
    for old, new in pairs:
        held = [(p, v // old * new if v else new) for p, v in free if not v or v % old == 0]
        held = [(p, v) for p, v in held if count == 1 or dict(free)[p] is not None]
        yield from (dict(step) for step in itertools.combinations(held, count))


def edited(config: Any, edits: Mapping[Field, int]) -> Any:
    """A copy of a configuration with some fields set."""
    result = copy.deepcopy(config)
    for path, value in edits.items():
        holder = result
        for name in path[:-1]:
            holder = getattr(holder, name)
        setattr(holder, path[-1], value)
    return result


def _integers(config: Any, path: Field = ()) -> Iterator[tuple[Field, int | None]]:
    """Fields that hold an integer above 1 or None, those of nested configurations too."""
    aliases = set(getattr(config, "attribute_map", {}))
    for name, value in vars(config).items():
        if name.startswith("_") or name in aliases or name.endswith("_token_id"):
            continue
        if value is None or (type(value) is int and value > 1):
            yield (*path, name), value
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _integers(value, (*path, name))


def _shapes(kind: Any, config: Any, edits: Mapping[Field, int] | None = None) -> Shapes | None:
    """Shapes of the class at an edited configuration; None if it cannot be built, or not be read
    from a file again.
    """
    if config is None:
        return None
    try:
        trial = edited(config, edits or {})
        if hasattr(trial, "to_dict") and hasattr(type(trial), "from_dict"):
            trial = type(trial).from_dict(trial.to_dict())
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _all_shapes(kind(trial))
    except Exception:  # a class may refuse a size in any way
        return None


def _all_shapes(model: nn.Module) -> Shapes:
    """Of what is stored, and of buffers that are not: they tell a head's size from its number."""
    held = {**model.state_dict(), **dict(model.named_buffers())}
    return {name: tuple(tensor.shape) for name, tensor in held.items()}


def _wrong(
    shapes: Shapes | None, target: Shapes, ignored: Container[str] = ()
) -> set[tuple[str, int]] | None:
    """Dims at which the shapes differ; None if they are not of the same tensors."""
    mine = {name: shape for name, shape in (shapes or {}).items() if name not in ignored}
    if mine.keys() != target.keys():
        return None
    pairs = {name: (mine[name], target[name]) for name in target}
    if any(len(a) != len(b) for a, b in pairs.values()):
        return None
    return {(name, d) for name, (a, b) in pairs.items() for d in range(len(a)) if a[d] != b[d]}
