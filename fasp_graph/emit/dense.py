"""dense: the model of the old shapes with zeros in place of removed units, and a part of it cut.

    dense_twin    compact class -> the same class at its old sizes; computes the same
    shrunk        a wrapper around the twin, captured; what the plan removed is cut again

An exported form of a model (with a cache, one half of an encoder-decoder) is another program than
the one that was pruned. It is captured from the twin, and its own analysis says what goes with the
units that the plan removed: a cache narrows with V, because its labels meet V's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from passes.analysis import analysis
from passes.capture import Args, capture
from passes.errors import FaspGraphError
from passes.groups import DependencyGraph, Group
from passes.removal import Removal, removal, sliced
from passes.rewrite import rewrite
from passes.values import CLOSED, OpenAxes

from .compaction import spread
from .current import share, stored

Gone = dict[tuple[int, int, int], set[int]]
"""(run of the analysis, id of a tensor of the twin, dim) -> positions that the plan removed"""


@dataclass(frozen=True)
class Twin:
    """A dense model that computes what the compact one does, and what may be cut off it."""

    model: nn.Module
    gone: Gone
    compact: nn.Module


def dense_twin(model: nn.Module, deps: DependencyGraph, kept: Mapping[str, Any]) -> Twin:
    """The twin of a compact transformers model; `deps` and `kept` say how it was pruned."""
    twin = dense_shell(model)
    shapes = _cut_axes(twin, deps, kept)
    with torch.no_grad():
        for name, tensor in _tensors(twin).items():
            value = stored(model, name)
            if value is None:
                raise FaspGraphError(
                    f"{type(model).__name__} has no weight {name} any more, so its dense form "
                    "cannot be built · help: merge what wraps it (merge_and_unload()), or export "
                    "without a cache"
                )
            _fill(tensor, value.detach(), shapes.get(id(tensor), {}), name)
    return Twin(twin, _gone(twin, deps, kept), model)


def dense_shell(model: nn.Module) -> nn.Module:
    """The class of a transformers model at the sizes of its configuration, with random weights."""
    found: Any = model
    if not hasattr(found, "config"):
        raise FaspGraphError(
            f"{type(model).__name__} has no config to build its dense form from · help: export it "
            "without a cache"
        )
    with torch.random.fork_rng(devices=[]):
        shell: nn.Module = type(found)(copy.deepcopy(found.config))
    return shell.to(next(model.parameters()).dtype).eval()


@dataclass(frozen=True)
class Shrunk:
    """A captured program without what the plan removed; `uncut`: weights that this form of the
    model could not cut. They hold zeros.
    """

    graph_module: GraphModule
    inputs: tuple[Any, ...]
    uncut: tuple[str, ...]


def shrunk(
    twin: Twin,
    wrapper: nn.Module,
    inputs: tuple[Any, ...],
    shapes: Any,
    open_axes: OpenAxes = CLOSED,
) -> Shrunk:
    """`wrapper` (holding the twin as its `model`) captured, without what the plan removed; on the
    weights of the compact model, where they are the same.
    """
    captured = capture(wrapper, inputs, shapes=shapes)
    module, given = captured.graph_module, captured.inputs
    _without_wrapper(module)
    share(module, twin.model, "model.")
    if twin.gone:
        deps = analysis(module, given, False, open_axes)
        cut = removal(deps, _kept(deps, twin))
        given = _cut_inputs(module, given, cut)
        module = rewrite(module, cut, share=True)
    module = without_unused(module)
    share(module, twin.compact, "model.")
    return Shrunk(module, given[0], _uncut(module, twin))


def _without_wrapper(module: GraphModule) -> None:
    """Let the nodes name the user's modules (in place): the wrapper calls the model `model`."""
    for node in module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        node.meta["nn_module_stack"] = {
            key: (path.removeprefix("model").removeprefix("."), kind)
            for key, (path, kind) in stack.items()
        }


def _uncut(module: GraphModule, twin: Twin) -> tuple[str, ...]:
    held, found = _tensors(twin.model), dict[str, None]()
    for name, tensor in module.named_parameters():
        dense = held.get(name.removeprefix("model."))
        for _, number, dim in twin.gone:
            if number == id(dense) and dense is not None and tensor.shape[dim] == dense.shape[dim]:
                found[name.removeprefix("model.")] = None
    return tuple(found)


def _cut_inputs(module: GraphModule, inputs: Args, cut: Removal) -> Args:
    """The example inputs without what is cut off their open axes."""
    leaves, spec = pytree.tree_flatten(inputs)
    names = [node.name for node in module.graph.nodes if node.op == "placeholder"]
    small = [
        sliced(leaf, cut.cuts(name)) if isinstance(leaf, Tensor) else leaf
        for leaf, name in zip(leaves, names, strict=True)
    ]
    return pytree.tree_unflatten(small, spec)


def without_unused(module: GraphModule) -> GraphModule:
    """Drop the parameters and buffers that no node reads (in place)."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for path, holder in module.named_modules():
        for table in (holder._parameters, holder._buffers):
            for leaf in list(table):
                if (f"{path}.{leaf}" if path else leaf) not in read:
                    delattr(holder, leaf)
    return module


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all names that they have."""
    return dict(
        [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
    )


def _fill(tensor: Tensor, value: Tensor, gone: Mapping[int, set[int]], name: str) -> None:
    """`value` at the places that stay, zero at the others."""
    if tensor.shape == value.shape:
        tensor.copy_(value)
        return
    axes = [
        [i for i in range(size) if i not in gone.get(dim, ())]
        for dim, size in enumerate(tensor.shape)
    ]
    if [len(axis) for axis in axes] != list(value.shape):
        raise FaspGraphError(
            f"{name} has shape {tuple(value.shape)}, which the plan does not make of "
            f"{tuple(tensor.shape)} · help: give the dense model that this folder was pruned from"
        )
    tensor.copy_(spread(value, axes, tensor.shape))


def _removed(
    deps: DependencyGraph, kept: Mapping[str, Any]
) -> list[tuple[Group, str, int, set[int]]]:
    """(group, parameter, dim, positions) of everything that the plan removed."""
    found = []
    for name, units in kept.items():
        group, stays = deps[name], set(units)
        rows = [u for u in range(group.size) if u not in stays]
        for member in group.members:
            gone = set(member.indices[rows].reshape(-1).tolist())
            found.append((group, member.parameter, member.dim, gone))
    return found


def _cut_axes(
    twin: nn.Module, deps: DependencyGraph, kept: Mapping[str, Any]
) -> dict[int, dict[int, set[int]]]:
    held, found = _tensors(twin), dict[int, dict[int, set[int]]]()
    for _, name, dim, gone in _removed(deps, kept):
        if name in held:
            found.setdefault(id(held[name]), {}).setdefault(dim, set()).update(gone)
    return found


def _gone(twin: nn.Module, deps: DependencyGraph, kept: Mapping[str, Any]) -> Gone:
    held, found = _tensors(twin), Gone()
    for group, name, dim, gone in _removed(deps, kept):
        if name in held and gone:
            found.setdefault((group.layer, id(held[name]), dim), set()).update(gone)
    return found


def _kept(deps: DependencyGraph, twin: Twin) -> dict[str, list[int]]:
    """Of each group of a wrapper's program: the units that the plan did not remove."""
    held, kept = _tensors(twin.model), {}
    for group in deps.groups:
        if group.kind == "frozen":
            continue
        away = np.ones(group.size, bool)
        for member in group.members:
            tensor = held.get(member.parameter.removeprefix("model."))
            places = twin.gone.get((group.layer, id(tensor), member.dim), set())
            away &= np.isin(member.indices, list(places)).all(1)
        if away.any():
            kept[group.name] = np.flatnonzero(~away).tolist()
    return kept
