"""layout: can a model's configuration say the pruned shapes?

A configuration field says a set of groups if changing it alone, and building the class again,
shortens exactly the dims that the groups' members lie on, and each as if every group had lost the
same number of units. That is found by trying (on the meta device, where building is cheap), not by
a table of models. Where it holds and all groups of a field keep equally many units, a plain
`from_pretrained` loads the result.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from passes.couple import Group
from passes.errors import BudgetError
from passes.select import Budget

Shapes = dict[str, tuple[int, ...]]
Field = tuple[str, ...]  # path of attributes from the configuration, through nested ones
Edits = dict[Field, int]


def fields(model: nn.Module, groups: Iterable[Group]) -> dict[Field, tuple[str, ...]]:
    """Configuration field -> names of the groups whose size it says, all of them at once."""
    config = getattr(model, "config", None)
    dense = _shapes(type(model), config)
    if dense is None:
        return {}
    known = list(groups)
    units = sorted({g.size // g.blocks for g in known})
    found: dict[Field, tuple[str, ...]] = {}
    for path, value in _integers(config):
        for trial in [value - 1, value // 2] if value else [n - 1 for n in units]:
            said = _said(dense, _shapes(type(model), config, {path: trial}), known)
            if said:
                found[path] = said
                break
    return found


def _said(dense: Shapes, shapes: Shapes | None, groups: list[Group]) -> tuple[str, ...]:
    """The groups that explain every difference of shapes by one number of lost units; or none."""
    moved = _wrong(shapes, dense) or set()
    inside = [g for g in groups if {(m.parameter, m.dim) for m in g.members} <= moved]
    per_unit: dict[tuple[str, int], int] = {}
    for member in (m for g in inside for m in g.members):
        key = (member.parameter, member.dim)
        per_unit[key] = per_unit.get(key, 0) + len(member.indices[0])
    if shapes is None or not moved or per_unit.keys() != moved:
        return ()
    lost = {divmod(dense[n][d] - shapes[n][d], per_unit[n, d]) for n, d in moved}
    return tuple(g.name for g in inside) if len(lost) == 1 and lost.pop()[1] == 0 else ()


def uniform_groups(model: nn.Module, groups: list[Group]) -> tuple[list[Group], list[set[str]]]:
    """The groups that the configuration can say, and the sets of them that share a field."""
    sets = [set(names) for names in fields(model, groups).values()]
    said = [g for g in groups if any(g.name in names for names in sets)]
    if not said:
        raise BudgetError(
            f"layout='uniform': no configuration field of {type(model).__name__} says the size of "
            "a group that can be pruned · help: layout='free'"
        )
    return said, sets


def equalised(budget: Budget, sets: Iterable[set[str]]) -> Budget:
    """The same number of kept units in all groups of a set: the mean, rounded."""
    keep = dict(budget.keep)
    for names in sets:
        counts = [keep[name] for name in names if name in keep]
        if counts:
            mean = round(sum(counts) / len(counts))
            keep |= {name: mean for name in names if name in keep}
    return dataclasses.replace(budget, keep=keep)


def plain_config(small: nn.Module, changes: Iterable[tuple[int, int]]) -> Any:
    """A configuration with which the class has exactly `small`'s shapes, or None.

    `changes`: old and new sizes that occur. A field is set where that brings more shapes to what
    they must be and none away from it, until all are.
    """
    config = getattr(small, "config", None)
    target = _state_shapes(small)
    edits: Edits = {}
    wrong = _wrong(_shapes(type(small), config), target)
    pairs = list(changes)
    while wrong:
        for path, value in _integers(config):
            news = {new for old, new in pairs if value in (None, old)} if path not in edits else ()
            better = next(_improving(small, config, edits, path, news, target, wrong), None)
            if better is not None:
                edits, wrong = better
                break
        else:
            return None
    return edited(config, edits) if wrong is not None else None


def _improving(
    small: nn.Module,
    config: Any,
    edits: Edits,
    path: Field,
    news: Iterable[int],
    target: Shapes,
    wrong: set[tuple[str, int]],
) -> Iterator[tuple[Edits, set[tuple[str, int]]]]:
    for new in news:
        trial = {**edits, path: new}
        left = _wrong(_shapes(type(small), config, trial), target)
        if left is not None and left < wrong:
            yield trial, left


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
    """Shapes of the class at an edited configuration; None if it cannot be built."""
    if config is None:
        return None
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return _state_shapes(kind(edited(config, edits or {})))
    except Exception:  # a class may refuse a size in any way
        return None


def _state_shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _wrong(shapes: Shapes | None, target: Shapes) -> set[tuple[str, int]] | None:
    if shapes is None or shapes.keys() != target.keys():
        return None
    pairs = {name: (shapes[name], target[name]) for name in target}
    if any(len(a) != len(b) for a, b in pairs.values()):
        return None
    return {(name, d) for name, (a, b) in pairs.items() for d in range(len(a)) if a[d] != b[d]}
