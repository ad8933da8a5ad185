"""emit 2: the user's own class with smaller weights.

Every parameter is replaced by its compact form and the size attributes of its module follow. A
group's way is then

    native    the class's own code runs at the new size
    adapter   the class's code has the old size burned in: the producers scatter their output back
    to the old width, the
              consumers gather their input from it, in forward hooks. Weights, state_dict and
              outputs are compact
    graph     neither works: the model is the compact graph itself

Each is accepted only if the numbers equal the compact graph's, so a guess can never be silently
wrong.
"""

from __future__ import annotations

import copy
import functools
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.capture import Args, tensors
from passes.couple import DependencyGraph, Group
from passes.rewrite import attribute
from passes.select import Plan

SIZES = {
    nn.Linear: (("out_features", 0), ("in_features", 1)),
    nn.Embedding: (("num_embeddings", 0), ("embedding_dim", 1)),
    nn.Conv1d: (("out_channels", 0), ("in_channels", 1)),
    nn.Conv2d: (("out_channels", 0), ("in_channels", 1)),
    nn.Conv3d: (("out_channels", 0), ("in_channels", 1)),
    nn.BatchNorm1d: (("num_features", 0),),
    nn.BatchNorm2d: (("num_features", 0),),
    nn.BatchNorm3d: (("num_features", 0),),
}


CHANNELS_FIRST = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
)


@dataclass(frozen=True)
class Emission:
    """How the user's class was made smaller; JSON-able by `to_dict`, replayed by `apply_shapes`.

    shapes: parameter or buffer -> new shape; attributes: module -> name -> value;
    scatter / gather: module -> (axis, its size before, kept positions); ways: group -> native |
    adapter | graph.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: dict[str, dict[str, int]] = field(default_factory=dict)
    scatter: dict[str, tuple[int, int, tuple[int, ...]]] = field(default_factory=dict)
    gather: dict[str, tuple[int, int, tuple[int, ...]]] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "shapes": {k: list(v) for k, v in self.shapes.items()},
            "attributes": self.attributes,
            "scatter": {k: [a, n, list(i)] for k, (a, n, i) in self.scatter.items()},
            "gather": {k: [a, n, list(i)] for k, (a, n, i) in self.gather.items()},
            "ways": self.ways,
        }

    @staticmethod
    def from_dict(found: dict[str, Any]) -> Emission:
        """The inverse of `to_dict`."""
        return Emission(
            {k: tuple(v) for k, v in found["shapes"].items()},
            {k: {n: int(v) for n, v in a.items()} for k, a in found["attributes"].items()},
            {k: (int(a), int(n), tuple(i)) for k, (a, n, i) in found["scatter"].items()},
            {k: (int(a), int(n), tuple(i)) for k, (a, n, i) in found["gather"].items()},
            dict(found["ways"]),
        )


def emit_model(
    model: nn.Module, compact: GraphModule, deps: DependencyGraph, plan: Plan, inputs: Args
) -> tuple[nn.Module, Emission]:
    """A smaller copy of `model` whose outputs equal `compact`'s, and how it was made."""
    groups = [g for g in deps.groups if g.name in plan.kept]
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(re.sub(r"\d+", "*", group.name), []).append(group)
    with torch.no_grad():
        expected = tensors(compact(*inputs[0], **inputs[1]))
    adapted: set[str] = set()
    if not _agrees(_build(model, compact, deps, plan, groups, adapted), inputs, expected):
        adapted = set(families)
        for family in list(families):
            trial = adapted - {family}
            names = {g.name for f in trial for g in families[f]}
            if _agrees(_build(model, compact, deps, plan, groups, names), inputs, expected):
                adapted = trial
        adapted = {g.name for f in adapted for g in families[f]}
    result = _build(model, compact, deps, plan, groups, adapted)
    if result is None or not _agrees(result, inputs, expected):
        return copy.deepcopy(compact), Emission(ways={g.name: "graph" for g in groups})
    return result


def _agrees(built: tuple[nn.Module, Emission] | None, inputs: Args, expected: list[Tensor]) -> bool:
    if built is None:
        return False
    try:
        with torch.no_grad():
            actual = tensors(built[0](*inputs[0], **inputs[1]))
    except Exception:  # the class's own code may fail in any way at a size it does not know
        return False
    actual = actual[: len(expected)]
    return len(actual) == len(expected) and all(
        a.shape == e.shape
        and torch.allclose(a.double(), e.double(), rtol=1e-3, atol=_tolerance(e), equal_nan=True)
        for a, e in zip(actual, expected, strict=True)
    )


def _tolerance(tensor: Tensor) -> float:
    scale = float(tensor.abs().max()) if tensor.numel() else 1.0
    return max(1.0, scale) * (1e-4 if tensor.dtype in (torch.float32, torch.float64) else 5e-2)


def _build(
    model: nn.Module,
    compact: GraphModule,
    deps: DependencyGraph,
    plan: Plan,
    groups: list[Group],
    adapted: set[str],
) -> tuple[nn.Module, Emission] | None:
    emission = Emission(ways={g.name: "adapter" if g.name in adapted else "native" for g in groups})
    names = _names(model, compact)
    for mine, theirs in names.items():
        old, new = attribute(model, mine), attribute(compact, theirs)
        if old.shape != new.shape:
            emission.shapes[mine] = tuple(new.shape)
            path = mine.rpartition(".")[0]
            sizes = _attributes(model.get_submodule(path), old, new)
            emission.attributes.setdefault(path, {}).update(sizes)
    for group in groups:
        if group.name in adapted:
            _adapt(emission, model, group, set(plan.kept[group.name]), deps)
    small = apply_shapes(copy.deepcopy(model).eval(), emission)
    with torch.no_grad():
        for mine, theirs in names.items():
            attribute(small, mine).copy_(attribute(compact, theirs))
    return small.train(model.training), emission


def _names(model: nn.Module, compact: GraphModule) -> dict[str, str]:
    """The model's parameters and buffers -> the names under which the compact graph holds
    them (ties included).
    """
    held = {n for n, _ in compact.named_parameters(remove_duplicate=False)}
    held |= {n for n, _ in compact.named_buffers(remove_duplicate=False)}
    result: dict[str, str] = {}
    by_identity: dict[int, str] = {}
    own = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in own:
        if name in held:
            result[name] = name
            by_identity.setdefault(id(tensor), name)
    for name, tensor in own:
        if name not in result and id(tensor) in by_identity:
            result[name] = by_identity[id(tensor)]
    return result


def _attributes(module: nn.Module, old: Tensor, new: Tensor) -> dict[str, int]:
    """Integer attributes of the owning module that state the size of a pruned dim."""
    for kind, sizes in SIZES.items():
        if isinstance(module, kind) and old.dim() >= len(sizes):
            found = {name: new.shape[d] for name, d in sizes if old.shape[d] != new.shape[d]}
            groups = getattr(module, "groups", 1)
            if groups > 1 and groups == old.shape[0] and old.dim() > 2:
                found |= {"groups": new.shape[0], "in_channels": new.shape[0]}
            return found
    same = {size for size, left in zip(old.shape, new.shape, strict=True) if size == left}
    moved = {
        s: left for s, left in zip(old.shape, new.shape, strict=True) if s != left and s not in same
    }
    return {k: moved[v] for k, v in vars(module).items() if type(v) is int and v in moved}


def _adapt(
    emission: Emission, model: nn.Module, group: Group, kept: set[int], deps: DependencyGraph
) -> None:
    """Producers scatter, consumers gather, modules of vectors alone (norms) do both.

    Positions add up over the groups that share a module.
    """
    consuming = {(c.parameter, c.dim) for c in group.consumers if c.parameter}
    for member in group.members:
        if member.parameter not in deps.parameters:  # a buffer: its module's weights say the same
            continue
        path = member.parameter.rpartition(".")[0]
        module = model.get_submodule(path)
        size = deps.parameters[member.parameter][member.dim]
        gone = {i for unit, held in enumerate(member.indices) if unit not in kept for i in held}
        if (member.parameter, member.dim) in consuming:
            tables = [emission.gather]
        elif all(p.dim() < 2 for p in module.parameters(recurse=False)):
            tables = [emission.gather, emission.scatter]
        else:
            tables = [emission.scatter]
        axis = 1 if isinstance(module, CHANNELS_FIRST) else -1
        for table in tables:
            before = table.get(path, (axis, size, tuple(range(size))))
            table[path] = (axis, size, tuple(i for i in before[2] if i not in gone))


def apply_shapes(model: nn.Module, emission: Emission | dict[str, Any]) -> nn.Module:
    """Give `model` (dense, changed in place) the shapes and adapters of `emission`; weights
    are left uninitialised.
    """
    if isinstance(emission, dict):
        emission = Emission.from_dict(emission)
    made: dict[int, Tensor] = {}
    for name, shape in emission.shapes.items():
        path, _, leaf = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, leaf)
        if id(old) not in made:
            empty = torch.zeros(shape, dtype=old.dtype, device=old.device)
            made[id(old)] = (
                nn.Parameter(empty, old.requires_grad) if isinstance(old, nn.Parameter) else empty
            )
            made[-id(old)] = old  # keeps the old tensor alive, so that its id stays unique
        setattr(owner, leaf, made[id(old)])
    for path, sizes in emission.attributes.items():
        for name, value in sizes.items():
            setattr(model.get_submodule(path), name, value)
    for path, (axis, size, kept) in emission.scatter.items():
        module = model.get_submodule(path)
        module.register_buffer("_fasp_scatter", _places(size, kept), persistent=False)
        module.register_forward_hook(functools.partial(_scatter_output, axis=axis))
    for path, (axis, _, kept) in emission.gather.items():
        module = model.get_submodule(path)
        module.register_buffer("_fasp_gather", torch.tensor(kept), persistent=False)
        module.register_forward_pre_hook(functools.partial(_gather_input, axis=axis))
    return model


def _places(size: int, kept: tuple[int, ...]) -> Tensor:
    """For each old position: where the kept one is now; removed ones point at a zero that is
    appended.
    """
    places = torch.full((size,), len(kept))
    places[list(kept)] = torch.arange(len(kept))
    return places


def _scatter_output(module: nn.Module, args: Any, output: Tensor, axis: int) -> Tensor:
    zero = torch.zeros_like(output.narrow(axis, 0, 1))
    return torch.cat([output, zero], axis).index_select(axis, module._fasp_scatter)


def _gather_input(module: nn.Module, args: tuple[Any, ...], axis: int) -> tuple[Any, ...]:
    return (args[0].index_select(axis, module._fasp_gather), *args[1:])
