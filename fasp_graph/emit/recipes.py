"""recipes: what each group's way changes in the user's class, entered into an Emission."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from passes.couple import Group
from passes.rewrite import attribute

from .compaction import Compaction
from .emission import Axis, Emission
from .sizes import Size, both, own_sizes, size_of, stated_sizes

Way = tuple[str, ...]  # ("attributes", name, ...) and WIDE carry more than a name
NATIVE, ADAPTER, PADDED = ("native",), ("adapter",), ("padded",)
WIDE = ("adapter", "wide")  # a norm between the two sees the old width
CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)


def record(
    emission: Emission, weights: Compaction, group: Group, chosen: Mapping[str, Way]
) -> None:
    """Enter what `group`'s way changes besides shapes."""
    way = chosen[group.name]
    for mine, theirs in weights.names.items():
        if not any(member.parameter == theirs for member in group.members):
            continue
        path, _, leaf = mine.rpartition(".")
        module = weights.model.get_submodule(path)
        old = attribute(weights.model, mine)
        cut = {g for g, w in chosen.items() if w[0] != "padded" and not _at_old_width(module, w)}
        shape = [len(weights.left(theirs, d, n, cut)) for d, n in enumerate(old.shape)]
        _set(emission, path, module, own_sizes(module, tuple(old.shape), tuple(shape)))
    if way[0] == "attributes":
        kept = weights.kept[group.name]
        for path, sizes in stated_sizes(weights.model, group, kept, set(way[1:])).items():
            _set(emission, path, weights.model.get_submodule(path), sizes)
    elif way[0] == "adapter":
        _adapt(emission, weights, group, chosen)
    elif way[0] == "padded":
        _pad(emission, weights, group, chosen)


def _set(emission: Emission, path: str, module: nn.Module, sizes: Mapping[str, Size]) -> None:
    for name, new in sizes.items():
        old = size_of(getattr(module, name))
        assert old is not None
        held = emission.attributes.setdefault(path, {})
        held[name] = both(old, held.get(name, old), new)
        emission.before.setdefault(path, {})[name] = old


def _axes(
    weights: Compaction, group: Group, chosen: Mapping[str, Way], way: str
) -> Iterator[tuple[str, str, int, Axis]]:
    """(my name, its name, dim, axis) of each member that is a weight of the model.

    The axis counts in the interface's width: without the units of groups that are cut natively.
    """
    inner = {g for g, w in chosen.items() if w[0] in ("native", "attributes")}
    bridged = {g for g, w in chosen.items() if w[0] == way} | inner
    for member in group.members:
        for mine, theirs in weights.names.items():
            if theirs != member.parameter:
                continue
            size = attribute(weights.model, mine).shape[member.dim]
            outer = weights.left(theirs, member.dim, size, inner)
            stays = set(weights.left(theirs, member.dim, size, bridged))
            kept = tuple(number for number, place in enumerate(outer) if place in stays)
            yield mine, theirs, member.dim, (member.dim, len(outer), kept)


def _adapt(
    emission: Emission, weights: Compaction, group: Group, chosen: Mapping[str, Way]
) -> None:
    """Producers scatter, consumers gather; element-wise modules (norms, depthwise) do both, or work
    at the old width, their weights padded.
    """
    consuming = {(c.parameter, c.dim) for c in group.consumers if c.parameter}
    parameters = dict(weights.compact.named_parameters(remove_duplicate=False))
    cost = 0
    for mine, theirs, dim, (_, size, kept) in _axes(weights, group, chosen, "adapter"):
        if theirs not in parameters:  # a buffer: its module's weights say the same
            continue
        path = mine.rpartition(".")[0]
        module = weights.model.get_submodule(path)
        tables = [emission.gather] if (theirs, dim) in consuming else [emission.scatter]
        if (theirs, dim) not in consuming and _elementwise(module):
            tables = [emission.gather, emission.scatter]
            if _at_old_width(module, chosen[group.name]):
                emission.padded[mine] = ((dim, size, kept),)
                continue
        axis = 1 if isinstance(module, CHANNELS_FIRST) else -1
        for table in tables:
            if path not in table:
                cost += size if table is emission.scatter else len(kept)
            table[path] = (axis, size, kept)
    emission.costs[group.name] = cost


def _at_old_width(module: nn.Module, way: Way) -> bool:
    return way == WIDE and _elementwise(module)


def _elementwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    vectors = all(p.dim() < 2 for p in module.parameters(recurse=False))
    return vectors or (groups > 1 and groups == getattr(module, "in_channels", 0))


def _pad(emission: Emission, weights: Compaction, group: Group, chosen: Mapping[str, Way]) -> None:
    cost = 0
    for mine, _, _, axis in _axes(weights, group, chosen, "padded"):
        others = [a for a in emission.padded.get(mine, ()) if a[0] != axis[0]]
        emission.padded[mine] = (*others, axis)
        cost += attribute(weights.model, mine).numel()
    emission.costs[group.name] = cost
