"""rehearsal: which groups a rewrite cannot cut, found on shapes alone.

The graph is rewritten with weights that are shapes, and run on shapes. Where a node cannot be
rewritten, or does not take the sizes that it gets, the groups that are cut there are to blame:
those that it refuses by themselves, else all of them. They become frozen, with that as the reason.
What is wrong in numbers is not looked for here: that is an error of ours (passes/verify.py).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from .alone import alone
from .capture import Args
from .errors import UnsupportedOp, brief, where
from .functional import written
from .groups import KINDS, DependencyGraph, Group
from .lazy import Lazy
from .removal import Removal, count, removal
from .rewrite import shrink
from .select import least, select
from .values import Value

Kept = Mapping[str, Sequence[int]]
Reasons = dict[str, str]
WAY_OUT = (
    "help: this group stays, the others are pruned; align=8 gives sizes that kernels take; if it "
    "should go, report it with the model"
)


def rehearsed(module: GraphModule, inputs: Args, deps: DependencyGraph) -> DependencyGraph:
    """`deps` with every group frozen that a rewrite cannot cut, units at random: of all kinds
    together, and where that is refused kind by kind. Blocks of which one is left are apart: what
    differs between blocks would not be seen.
    """
    deps = frozen(deps, _remembered(module, deps))
    every = dict(_drawn(deps.groups))
    single = {name: units for name, units in every.items() if deps[name].layer and len(units) == 1}
    several = {name: units for name, units in every.items() if name not in single}
    refused: dict[str, str] = {}
    for drawn in (several, single):
        if drawn and refusals(module, inputs, deps, drawn):
            for kind in KINDS:
                kept = {name: units for name, units in drawn.items() if deps[name].kind == kind}
                refused |= _refused(module, inputs, deps, kept)
    return frozen(deps, refused)


def _remembered(module: GraphModule, deps: DependencyGraph) -> Reasons:
    """Groups of nothing but tables that forward writes: their places are told by when."""
    tables = written(module.graph)
    return {
        group.name: f"a table that forward writes: {group.members[0].parameter}"
        for group in deps.groups
        if group.kind != "frozen" and {m.parameter for m in group.members} <= tables
    }


def _refused(module: GraphModule, inputs: Args, deps: DependencyGraph, kept: Kept) -> Reasons:
    """What has to go from `kept` until the rest is not refused."""
    refused: dict[str, str] = {}
    while kept and (found := refusals(module, inputs, deps, kept)):
        refused |= found
        kept = {name: units for name, units in kept.items() if name not in found}
    return refused


def frozen(deps: DependencyGraph, reasons: Mapping[str, str]) -> DependencyGraph:
    """`deps` with groups frozen for reasons of their own."""
    if not reasons:
        return deps
    groups = [
        replace(g, kind="frozen", reason=reasons[g.name]) if g.name in reasons else g
        for g in deps.groups
    ]
    return replace(deps, groups=tuple(groups))


def _drawn(groups: Iterable[Group]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """About half of the units of each group that can lose any: at random, and others in each block
    than in the one before.
    """
    draw = torch.Generator().manual_seed(0)
    for group in (group for group in groups if group.kind != "frozen"):
        size = group.size // group.blocks
        keep = max(least(group, 1), size // 2)
        worth, utility = torch.rand(size, generator=draw), torch.zeros(group.size)
        for block in range(group.blocks):
            utility[torch.from_numpy(group.block_of == block)] = worth.roll(block)
        if keep < size:
            yield group.name, select(group, utility, keep)


def refusals(module: GraphModule, inputs: Args, deps: DependencyGraph, kept: Kept) -> Reasons:
    """Of the groups of `kept` those that cannot be cut like this -> why."""
    fakes, cut = FakeTensorMode(allow_non_fake_inputs=True), removal(deps, kept)
    compact = _shapes_of(module, fakes)
    with torch.no_grad():
        failed: dict[Node, Exception] = dict(shrink(compact, cut))
    failed = failed or _misfits(compact, module, inputs, cut, fakes)
    found: dict[str, str] = {}
    known = {node.name: node for node in module.graph.nodes}
    for node, error in failed.items():
        at = _known(node, known)
        if at is not None:
            reason = f"it cannot be cut out: {brief(error, 200)} · {where(at)} · {WAY_OUT}"
            found |= dict.fromkeys(_blamed(module, at, cut, kept, found), reason)
    return found


def _known(node: Node, known: Mapping[str, Node]) -> Node | None:
    """The node of the dense graph that a node stands for, or is made of."""
    while node.name not in known:
        if not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return known[node.name]


def _shapes_of(module: GraphModule, fakes: FakeTensorMode) -> GraphModule:
    """A copy whose floating-point weights are shapes, where they are."""
    held = [*module.parameters(), *module.buffers()]
    held += [v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor)]
    memo: dict[int, Any] = {}
    for tensor in held:
        if tensor.is_floating_point() or tensor.is_complex():
            memo[id(tensor)] = _shape_of(tensor, fakes)
    return copy.deepcopy(module, memo)


def _shape_of(tensor: Tensor, fakes: FakeTensorMode) -> Tensor:
    device = "cpu" if tensor.is_meta or isinstance(tensor, Lazy) else tensor.device
    with fakes:
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(made, requires_grad=False)
    return made


class _Runner(Interpreter):
    """Goes on behind a node that does not take its sizes, with what was promised of its results."""

    def __init__(self, compact: GraphModule, cut: Removal) -> None:
        super().__init__(compact)
        self.cut, self.failed = cut, dict[Node, Exception]()

    def run_node(self, n: Node) -> Any:
        try:
            return super().run_node(n)
        except Exception as error:  # any op may refuse sizes in any way
            self.failed[n] = error
            leaves, form = pytree.tree_flatten(n.meta["val"])
            made = [self._promised(n, slot, leaf) for slot, leaf in enumerate(leaves)]
            return pytree.tree_unflatten(made, form)

    def _promised(self, node: Node, slot: int, dense: Tensor) -> Tensor:
        sizes = list(self.cut.value(node.name, slot).shape)
        with unset_fake_temporarily():
            for dim, mask in self.cut.cuts(node.name, slot).items():
                sizes[dim] = count(mask, dim)
        device = "cpu" if dense.device.type == "meta" else dense.device
        return torch.empty(sizes, dtype=dense.dtype, device=device)


def _misfits(
    compact: GraphModule, dense: GraphModule, inputs: Args, cut: Removal, fakes: FakeTensorMode
) -> dict[Node, Exception]:
    """The nodes where the compact graph does not take the sizes; {} where the dense one does not
    run on shapes either, so that nothing is told by it.
    """
    given = [
        _shape_of(v, fakes) if isinstance(v, Tensor) and v.is_floating_point() else v
        for v in pytree.tree_leaves(inputs)
    ]
    runner = _Runner(compact, cut)
    with fakes, torch.no_grad(), _quiet():
        with suppress(Exception):  # of some nodes nothing is promised: the run ends there
            runner.run(*given)
        try:
            if runner.failed:
                Interpreter(_shapes_of(dense, fakes)).run(*given)
        except Exception:
            return {}
    return runner.failed


@contextmanager
def _quiet() -> Iterator[None]:
    """torch logs every op that refuses its sizes."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _blamed(module: GraphModule, node: Node, cut: Removal, kept: Kept, found: Reasons) -> list[str]:
    """The groups that are cut at a node: those that it refuses by themselves, else all, if none of
    them was `found` already: the others may do without it.
    """
    layers = [_standing(node, cut, number) for number in range(len(cut.gone))]
    groups = [cut.deps[name] for name in kept]
    here = [g.name for g in groups if np.isin(g.components, layers[g.layer]).any()]
    alone = [name for name in here if _refuses(module, node, removal(cut.deps, {name: kept[name]}))]
    return alone or ([] if any(name in found for name in here) else here)


def _standing(node: Node, cut: Removal, layer: int) -> np.ndarray:
    """The units on what a node reads and makes."""
    component, found = cut.deps.layers[layer].component, [np.zeros(0, int)]
    for name in (node.name, *(arg.name for arg in node.all_input_nodes)):
        for slot in range(cut.results(name)):
            value = cut.value(name, slot, layer)
            arrays = value.arrays.values() if isinstance(value, Value) else ()
            found += [component[array.numpy()].reshape(-1) for array in arrays]
    return np.unique(np.concatenate(found))


def _refuses(module: GraphModule, node: Node, cut: Removal) -> bool:
    """Whether a node by itself, in a graph of nothing else, cannot be rewritten."""
    try:
        alone(module, node, cut)
    except UnsupportedOp:
        return True
    return False
