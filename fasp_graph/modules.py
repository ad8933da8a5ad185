"""emit 2: the user's own class with smaller weights.

Weights are replaced by their compact form, then each group needs a way (fasp_graph/emission.py) in
which the class's own code computes the same as the compact graph. It is searched:

    all groups native?  ->  else, family by family:
    native, attributes (singly, then all, then in pairs), adapter, padded   ->  first that agrees

A family is the same group of every layer; if it has no common way, its groups are tried one by
one. What is not yet decided keeps its old size with zeros in place of removed units, which
computes the same, so each trial judges one family alone and their number is linear. A trial is
accepted only if its numbers equal the compact graph's at several inputs of several sizes, so a
guess can never be silently wrong. Trials are copies that share the weights; the user's model is
never touched.
"""

from __future__ import annotations

import copy
import functools
import itertools
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.capture import Args, tensors
from passes.couple import DependencyGraph, Group
from passes.rewrite import attribute
from passes.select import Plan
from passes.verify import fresh_inputs

from .emission import Axis, Emission, apply_shapes

__all__ = ["Emission", "apply_shapes", "emit_model"]

CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm),
)
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
NATIVE, ADAPTER, INSIDE, PADDED = ("native",), ("adapter",), ("adapter", "inside"), ("padded",)

Way = tuple[str, ...]  # ("attributes", name, ...) and ADAPTER with INSIDE carry more than a name
Case = tuple[Args, list[Tensor]]


def emit_model(
    model: nn.Module, compact: GraphModule, deps: DependencyGraph, plan: Plan, inputs: Args
) -> tuple[nn.Module, Emission]:
    """A smaller copy of `model` whose outputs equal `compact`'s, and how it was made."""
    groups = tuple(g for g in deps.groups if g.name in plan.kept)
    search = _Search(model, compact, groups, plan.kept, _cases(compact, inputs))
    chosen = _choose(search)
    if chosen is None:
        return copy.deepcopy(compact), Emission(ways={g.name: "graph" for g in groups})
    trial, emission = search.build(chosen)
    small = copy.deepcopy(trial)
    for mine, theirs in zip(small.modules(), model.modules(), strict=False):
        mine.training = theirs.training
    return small.train(model.training), emission


def _choose(search: _Search) -> dict[str, Way] | None:
    """A way for each group, or None if some group has none."""
    native: dict[str, Way] = {group.name: NATIVE for group in search.groups}
    if search.agrees(native):
        return native
    chosen: dict[str, Way] = {}
    if not search.agrees(chosen):  # zeros do not stand for removed units of these kinds
        chosen = {g.name: NATIVE for g in search.groups if g.kind not in ("chain", "bilinear")}
        if not search.agrees(chosen):
            return None
    families: dict[str, list[Group]] = {}
    for group in search.groups:
        if group.name not in chosen:
            families.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    for family in families.values():
        found = _ways_of(search, family, chosen)
        if found is None:
            return None
        chosen |= found
    return chosen


def _ways_of(search: _Search, family: list[Group], chosen: dict[str, Way]) -> dict[str, Way] | None:
    """Ways for the groups of `family` on top of `chosen`: one for all, or each its own."""
    attributes = ((("attributes", *names)) for names in _attribute_sets(search.model, family))
    for way in itertools.chain([NATIVE], attributes, [ADAPTER, INSIDE, PADDED]):
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


# ---------------------------------------------------------------------------------------- trials
@dataclass(frozen=True)
class _Search:
    """What all trials share."""

    model: nn.Module
    compact: GraphModule
    groups: tuple[Group, ...]
    kept: Mapping[str, tuple[int, ...]]
    cases: list[Case]

    def agrees(self, chosen: Mapping[str, Way]) -> bool:
        """The class's own code, each group its way, equals the compact graph."""
        try:
            trial, _ = self.build(chosen)
            return all(_same(trial, args, expected) for args, expected in self.cases)
        except Exception:  # the class's own code may fail in any way at a size it does not know
            return False

    def build(self, chosen: Mapping[str, Way]) -> tuple[nn.Module, Emission]:
        """A trial that shares all weights, and its recipe; groups without a way keep their size."""
        emission = Emission(ways={g: way[0] for g, way in chosen.items()})
        values = {name: self._value(name, chosen) for name in self.names}
        for name, value in values.items():
            if value.shape != attribute(self.model, name).shape:
                emission.shapes[name] = tuple(value.shape)
        for group in self.groups:
            if group.name in chosen:
                _record(emission, self, group, chosen)
        return apply_shapes(skeleton(self.model), emission, values), emission

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """The model's parameters and buffers -> their names in the compact graph."""
        return _names(self.model, self.compact)

    @functools.cached_property
    def gone(self) -> dict[tuple[str, int], dict[str, set[int]]]:
        """(parameter, dim) -> group -> positions that go with its removed units."""
        found: dict[tuple[str, int], dict[str, set[int]]] = {}
        for group in self.groups:
            kept = set(self.kept[group.name])
            for member in group.members:
                gone = {i for u, held in enumerate(member.indices) if u not in kept for i in held}
                found.setdefault((member.parameter, member.dim), {})[group.name] = gone
        return found

    def left(self, name: str, dim: int, size: int, cut: Container[str] | None) -> list[int]:
        """Positions that stay along a dim if the groups in `cut` (None: all) are cut."""
        groups = self.gone.get((name, dim), {})
        gone = set().union(*(p for g, p in groups.items() if cut is None or g in cut))
        return [i for i in range(size) if i not in gone]

    @functools.cached_property
    def full(self) -> dict[str, Tensor]:
        """Every weight at its old size, zero where units are gone."""
        found: dict[str, Tensor] = {}
        for name, theirs in self.names.items():
            old, new = attribute(self.model, name), attribute(self.compact, theirs).detach()
            if old.shape != new.shape:
                axes = [self.left(theirs, d, n, None) for d, n in enumerate(old.shape)]
                if [len(axis) for axis in axes] == list(new.shape):
                    new = _filled(new, axes, old.shape)
            found[name] = new
        return found

    def _value(self, name: str, chosen: Mapping[str, Way]) -> Tensor:
        value, theirs = self.full[name], self.names[name]
        for dim, size in enumerate(value.shape):
            left = self.left(theirs, dim, size, chosen)
            if len(left) < size:
                value = value.index_select(dim, torch.tensor(left, device=value.device))
        return value


def _filled(new: Tensor, axes: list[list[int]], shape: torch.Size) -> Tensor:
    """`new` at the places `axes` of zeros of `shape`."""
    for dim, (axis, size) in enumerate(zip(axes, shape, strict=True)):
        if len(axis) < size:
            zeros = new.new_zeros([*new.shape[:dim], size, *new.shape[dim + 1 :]])
            new = zeros.index_copy(dim, torch.tensor(axis, device=new.device), new)
    return new


def skeleton(model: nn.Module) -> nn.Module:
    """A copy in eval mode that shares every parameter and buffer: cheap, never to be written to."""
    held = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in held}).eval()


def _names(model: nn.Module, compact: GraphModule) -> dict[str, str]:
    """The model's parameters and buffers -> their names in the compact graph, ties included."""
    held = {n for n, _ in compact.named_parameters(remove_duplicate=False)}
    held |= {n for n, _ in compact.named_buffers(remove_duplicate=False)}
    own = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    known = {id(tensor): name for name, tensor in reversed(own) if name in held}
    return {name: known[id(tensor)] for name, tensor in own if id(tensor) in known}


def _cases(compact: GraphModule, inputs: Args) -> list[Case]:
    """Inputs with the compact graph's outputs: the sample, fresh numbers, other sizes."""
    doubled = pytree.tree_map(lambda v: torch.cat([v, v]) if _batched(v) else v, inputs)
    lengths = {v.shape[1] for v in pytree.tree_leaves(inputs) if _sequence(v)}
    short = max(lengths, default=3) * 2 // 3
    shorter = pytree.tree_map(
        lambda v: v[:, :short].contiguous() if _sequence(v) and short > 1 else v, doubled
    )
    found: list[Case] = []
    for args in (inputs, fresh_inputs(inputs, 1, False), doubled, shorter):
        with torch.no_grad():
            try:
                found.append((args, tensors(compact(*args[0], **args[1]))))
            except (RuntimeError, IndexError, ValueError):
                if not found:
                    raise
    return found


def _batched(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) > 1


def _sequence(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _same(module: nn.Module, args: Args, expected: list[Tensor]) -> bool:
    with torch.no_grad():
        actual = tensors(module(*args[0], **args[1]))[: len(expected)]
    return len(actual) == len(expected) and all(
        a.shape == e.shape and torch.allclose(a.double(), e.double(), 0, _tolerance(e), True)
        for a, e in zip(actual, expected, strict=True)
    )


def _tolerance(tensor: Tensor) -> float:
    """Rounding of another order of sums, relative to the largest element."""
    if not tensor.numel():
        return 1.0
    unit = 1e-5 if tensor.dtype in (torch.float32, torch.float64) else 3e-2
    return unit * max(1e-3, float(tensor.abs().max()))


# --------------------------------------------------------------------------------------- recipes
def _record(emission: Emission, search: _Search, group: Group, chosen: Mapping[str, Way]) -> None:
    """Enter what `group`'s way changes besides shapes."""
    way = chosen[group.name]
    for mine, theirs in search.names.items():
        if not any(member.parameter == theirs for member in group.members):
            continue
        path, _, leaf = mine.rpartition(".")
        module = search.model.get_submodule(path)
        old = attribute(search.model, mine)
        inner = {g for g, w in chosen.items() if w[0] in ("native", "attributes") or w == INSIDE}
        shape = [len(search.left(theirs, d, n, inner)) for d, n in enumerate(old.shape)]
        _set(emission, path, module, _own_sizes(module, tuple(old.shape), tuple(shape)))
    if way[0] == "attributes":
        for path, sizes in _stated_sizes(search, group, set(way[1:])).items():
            _set(emission, path, search.model.get_submodule(path), sizes)
    elif way[0] == "adapter":
        _adapt(emission, search, group, chosen)
    elif way[0] == "padded":
        _pad(emission, search, group, chosen)


def _set(emission: Emission, path: str, module: nn.Module, sizes: Mapping[str, int]) -> None:
    for name, value in sizes.items():
        emission.attributes.setdefault(path, {})[name] = value
        emission.before.setdefault(path, {})[name] = int(getattr(module, name))


def _own_sizes(module: nn.Module, old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, int]:
    """What a leaf module states of the size of its own weights."""
    for kind, sizes in SIZES.items():
        if isinstance(module, kind) and len(old) >= len(sizes):
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


def _axes(
    search: _Search, group: Group, chosen: Mapping[str, Way], way: str
) -> Iterator[tuple[str, str, int, Axis]]:
    """(my name, its name, dim, axis) of each member that is a weight of the model.

    The axis counts in the interface's width: without the units of groups that are cut natively.
    """
    inner = {g for g, w in chosen.items() if w[0] in ("native", "attributes")}
    bridged = {g for g, w in chosen.items() if w[0] == way} | inner
    for member in group.members:
        for mine, theirs in search.names.items():
            if theirs != member.parameter:
                continue
            size = attribute(search.model, mine).shape[member.dim]
            outer = search.left(theirs, member.dim, size, inner)
            stays = set(search.left(theirs, member.dim, size, bridged))
            kept = tuple(number for number, place in enumerate(outer) if place in stays)
            yield mine, theirs, member.dim, (member.dim, len(outer), kept)


def _adapt(emission: Emission, search: _Search, group: Group, chosen: Mapping[str, Way]) -> None:
    """Producers scatter, consumers gather, element-wise modules (norms, depthwise) do both."""
    consuming = {(c.parameter, c.dim) for c in group.consumers if c.parameter}
    parameters = dict(search.compact.named_parameters(remove_duplicate=False))
    cost = 0
    for mine, theirs, dim, (_, size, kept) in _axes(search, group, chosen, "adapter"):
        if theirs not in parameters:  # a buffer: its module's weights say the same
            continue
        path = mine.rpartition(".")[0]
        module = search.model.get_submodule(path)
        tables = [emission.gather] if (theirs, dim) in consuming else [emission.scatter]
        if (theirs, dim) not in consuming and _elementwise(module):
            tables = [emission.gather, emission.scatter]
        axis = 1 if isinstance(module, CHANNELS_FIRST) else -1
        for table in tables:
            if path not in table:
                cost += size if table is emission.scatter else len(kept)
            table[path] = (axis, size, kept)
    emission.costs[group.name] = cost


def _elementwise(module: nn.Module) -> bool:
    groups = getattr(module, "groups", 1)
    vectors = all(p.dim() < 2 for p in module.parameters(recurse=False))
    return vectors or (groups > 1 and groups == getattr(module, "in_channels", 0))


def _pad(emission: Emission, search: _Search, group: Group, chosen: Mapping[str, Way]) -> None:
    cost = 0
    for mine, _, _, axis in _axes(search, group, chosen, "padded"):
        others = [a for a in emission.padded.get(mine, ()) if a[0] != axis[0]]
        emission.padded[mine] = (*others, axis)
        cost += attribute(search.model, mine).numel()
    emission.costs[group.name] = cost


# ------------------------------------------------------------------------------------ attributes
def _attribute_sets(model: nn.Module, family: list[Group]) -> list[tuple[str, ...]]:
    """Names of integer attributes that state an old size: singly, all, in pairs and triples."""
    names: dict[str, None] = {}
    for group in family:
        known = _changes(model, group, dict.fromkeys(range(group.size), 0))
        for module in _around(model, group).values():
            names |= {k: None for k, v in vars(module).items() if type(v) is int and v in known}
    every = tuple(names)
    sets = [(name,) for name in every] + ([every] if len(every) > 1 else [])
    more = itertools.chain(itertools.combinations(every, 2), itertools.combinations(every, 3))
    sets += [found for found in more if found != every]
    return sets[:ATTRIBUTE_TRIALS]


def _stated_sizes(search: _Search, group: Group, names: set[str]) -> dict[str, dict[str, int]]:
    """Module around the group -> attribute of `names` that states an old size -> the new one."""
    kept = dict.fromkeys(search.kept[group.name], 1)
    changes = _changes(search.model, group, kept)
    return {
        path: {
            name: changes[value]
            for name, value in vars(module).items()
            if name in names and type(value) is int and value in changes
        }
        for path, module in _around(search.model, group).items()
    }


def _changes(model: nn.Module, group: Group, kept: Mapping[int, int]) -> dict[int, int]:
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
