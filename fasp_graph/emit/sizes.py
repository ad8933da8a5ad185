"""sizes: the integers, alone or in tuples and lists, in which modules state sizes of weights."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from passes.couple import Group
from passes.rewrite import attribute

SIZES: dict[Any, tuple[tuple[str, int], ...]] = {
    nn.Linear: (("out_features", 0), ("in_features", 1)),
    nn.Embedding: (("num_embeddings", 0), ("embedding_dim", 1)),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), (("out_channels", 0), ("in_channels", 1))),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        (("in_channels", 0), ("out_channels", 1)),
    ),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (("num_features", 0),)),
}
ATTRIBUTE_TRIALS = 40
Size = int | tuple[int, ...]


def size_of(value: Any) -> Size | None:
    """An integer, or a tuple, list or torch.Size of integers as a tuple; None for all else."""
    if type(value) is int:
        return value
    if type(value) not in (tuple, list, torch.Size) or not value:
        return None
    return tuple(value) if all(type(number) is int for number in value) else None


def replaces(new: Any, old: Any) -> bool:
    """Whether both state sizes: two integers, or two sequences of equally many."""
    one, other = size_of(new), size_of(old)
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other)
    return isinstance(one, int) and isinstance(other, int)


def both(old: Size, first: Size, second: Size) -> Size:
    """Two changes of an old size at once: a tuple may state the sizes of several groups."""
    if isinstance(first, int) or isinstance(second, int):
        return second
    old = _each(old)
    return tuple(b if b != a else c for a, c, b in zip(old, first, second, strict=True))


def own_sizes(module: nn.Module, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, Size]:
    """What a leaf module states of the size of its own weights: an integer that is one of them, a
    tuple that is the last of them, or all.
    """
    for kind, sizes in SIZES.items():
        if isinstance(module, kind):
            if len(old) < len(sizes):  # a bias, of which its weight says all
                return {}
            found: dict[str, Size] = {name: new[d] for name, d in sizes if old[d] != new[d]}
            depthwise = getattr(module, "groups", 1) == old[0] != new[0] and len(old) > 2
            return found | ({"groups": new[0], "in_channels": new[0]} if depthwise else {})
    if any(True for _ in module.children()):
        return {}
    stays = {size for size, left in zip(old, new, strict=True) if size == left}
    moved = {size: left for size, left in zip(old, new, strict=True) if size not in stays}
    stated: dict[str, Size] = {}
    for name, size in _stated(module):
        last = slice(-len(_each(size)), None)
        if isinstance(size, int) and size in moved:
            stated[name] = moved[size]
        elif size == old[last] != new[last]:
            stated[name] = new[last]
    return stated


def attribute_sets(model: nn.Module, family: list[Group]) -> list[tuple[str, ...]]:
    """Names of attributes that state an old size: singly, all, in pairs and triples."""
    names: dict[str, None] = {}
    for group in family:
        known = _changes(model, group, range(group.size))
        for module in _around(model, group).values():
            held = _stated(module)
            names |= {name: None for name, size in held if not known.keys().isdisjoint(_each(size))}
    every = tuple(names)
    sets = [(name,) for name in every] + ([every] if len(every) > 1 else [])
    more = itertools.chain(itertools.combinations(every, 2), itertools.combinations(every, 3))
    sets += [found for found in more if found != every]
    return sets[:ATTRIBUTE_TRIALS]


def stated_sizes(
    model: nn.Module, group: Group, kept: Collection[int], names: set[str]
) -> dict[str, dict[str, Size]]:
    """Module around the group -> attribute of `names` that states an old size -> the new one."""
    changes = _changes(model, group, frozenset(kept))
    return {
        path: {
            name: _changed(size, changes)
            for name, size in _stated(module)
            if name in names and not changes.keys().isdisjoint(_each(size))
        }
        for path, module in _around(model, group).items()
    }


def _stated(module: nn.Module) -> Iterator[tuple[str, Size]]:
    """Attributes that may state sizes. The tuples of torch's own layers in SIZES state none of a
    weight: kernels, strides, paddings.
    """
    for name, value in vars(module).items():
        size = size_of(value)
        if type(size) is int or (size is not None and not isinstance(module, tuple(SIZES))):
            yield name, size


def _each(size: Size) -> tuple[int, ...]:
    return (size,) if isinstance(size, int) else size


def _changed(size: Size, changes: Mapping[int, int]) -> Size:
    """`size` with the new integers in place of old ones."""
    if isinstance(size, int):
        return changes.get(size, size)
    return tuple(changes.get(number, number) for number in size)


def _changes(model: nn.Module, group: Group, kept: Collection[int]) -> dict[int, int]:
    """Old size -> new size, of each member's dim, of the group's units, and of one block."""
    held = len(kept)
    found = {group.size // group.blocks: held // group.blocks, group.size: held}
    for member in group.members:
        size = attribute(model, member.parameter).shape[member.dim]
        gone = sum(len(rows) for u, rows in enumerate(member.indices) if u not in kept)
        found[size] = size - gone
    return found


def _around(model: nn.Module, group: Group) -> dict[str, nn.Module]:
    """Modules that own a member, and those around them up to the one that holds them all."""
    owners = {member.parameter.rpartition(".")[0] for member in group.members}
    parts = [owner.split(".") for owner in owners]
    common = [
        p[0] for p in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*parts, strict=False))
    ]
    depth = min(len(common), max(0, min(map(len, parts)) - 1))
    paths = {".".join(p[:k]) for p in parts for k in range(depth, len(p) + 1)}
    return {path: model.get_submodule(path) for path in sorted(paths)}
