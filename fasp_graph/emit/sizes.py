"""sizes: the integers in which modules state sizes of weights."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

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


def own_sizes(module: nn.Module, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, int]:
    """What a leaf module states of the size of its own weights."""
    for kind, sizes in SIZES.items():
        if isinstance(module, kind):
            if len(old) < len(sizes):  # a bias, of which its weight says all
                return {}
            found = {name: new[d] for name, d in sizes if old[d] != new[d]}
            depthwise = getattr(module, "groups", 1) == old[0] != new[0] and len(old) > 2
            return found | ({"groups": new[0], "in_channels": new[0]} if depthwise else {})
    if any(True for _ in module.children()):
        return {}
    stays = {size for size, left in zip(old, new, strict=True) if size == left}
    moved = dict(zip(old, new, strict=True))
    return {
        name: moved[value]
        for name, value in vars(module).items()
        if type(value) is int and moved.get(value, value) != value and value not in stays
    }


def attribute_sets(model: nn.Module, family: list[Group]) -> list[tuple[str, ...]]:
    """Names of integer attributes that state an old size: singly, all, in pairs and triples."""
    names: dict[str, None] = {}
    for group in family:
        known = _changes(model, group, range(group.size))
        for module in _around(model, group).values():
            names |= {k: None for k, v in vars(module).items() if type(v) is int and v in known}
    every = tuple(names)
    sets = [(name,) for name in every] + ([every] if len(every) > 1 else [])
    more = itertools.chain(itertools.combinations(every, 2), itertools.combinations(every, 3))
    sets += [found for found in more if found != every]
    return sets[:ATTRIBUTE_TRIALS]


def stated_sizes(
    model: nn.Module, group: Group, kept: Collection[int], names: set[str]
) -> dict[str, dict[str, int]]:
    """Module around the group -> attribute of `names` that states an old size -> the new one."""
    changes = _changes(model, group, frozenset(kept))
    return {
        path: {
            name: changes[value]
            for name, value in vars(module).items()
            if name in names and type(value) is int and value in changes
        }
        for path, module in _around(model, group).items()
    }


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
