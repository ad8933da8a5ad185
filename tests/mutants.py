"""Ways to break the analysis, the rewriter or its result on purpose.

A mutant of the result changes a verified compact graph. A mutant of the engine replaces one
function while a subject is analysed and rewritten; it counts only where it changes something.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from programs import build, sample
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from trial import chosen, zeroed

from passes import edits, moves, places, pointwise, removal, rewrite
from passes.analysis import analysis
from passes.capture import Args, capture
from passes.errors import FaspGraphError, VerificationError
from passes.groups import DependencyGraph
from passes.removal import Removal
from passes.values import Labels
from passes.verify import verify
from passes.visit import op_name

SUBJECTS = {
    "attention": (("attention", 3), ("mlp", 5)),
    "vision": (("conv", 2), ("pieces", 4)),
    "moved": (("shuffle", 2), ("pieces", 1)),
    "written": (("inplace", 5), ("twice", 3)),
}
KINDS = ("chain", "bilinear", "head")


@dataclass(frozen=True)
class Subject:
    """A captured program, its analysis, and a pruning of it."""

    module: GraphModule
    inputs: Args
    deps: DependencyGraph
    kept: dict[str, list[int]]
    cut: Removal
    compact: GraphModule


def subject(name: str) -> Subject:
    """All prunable groups of a program are cut."""
    captured = capture(build(SUBJECTS[name]), sample(0))
    return compiled(captured.graph_module, captured.inputs)


def compiled(module: GraphModule, inputs: Args) -> Subject:
    """Analysed, cut, rewritten; not verified."""
    deps = analysis(module, inputs, check=True)
    kept = chosen(deps, random.Random(3), KINDS, 1.0)
    cut = removal.removal(deps, kept)
    return Subject(module, inputs, deps, kept, cut, rewrite.rewrite(module, cut))


def verified(found: Subject) -> float:
    """The error of a subject; VerificationError if it is too large."""
    return verify(found.module, found.compact, found.cut, found.inputs)


# ---------------------------------------------------------------- mutants of the result
Change = Callable[[], None]


def of_weights(module: GraphModule) -> Iterator[tuple[str, Change]]:
    """Every parameter and buffer: rows swapped, indices shifted, scaled, forgotten."""
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and tensor.numel() > 1:
            if len(tensor) > 1:
                yield f"{name}: shifted", _assign(tensor, tensor.roll(1, 0))
            yield f"{name}: scaled", _assign(tensor, tensor * 1.01)
            yield f"{name}: forgotten", _assign(tensor, torch.zeros_like(tensor))
            if tensor.dim() > 1 and tensor.shape[1] > 1:
                yield f"{name}: columns shifted", _assign(tensor, tensor.roll(1, 1))


def _assign(tensor: Tensor, value: Tensor) -> Change:
    def change() -> None:
        tensor.copy_(value)

    return change


def of_nodes(module: GraphModule) -> Iterator[tuple[str, Change]]:
    """Single nodes: another bound, size, scale, order; an operand left out."""
    for node in module.graph.nodes:
        for what, args in _other_arguments(node):
            yield f"%{node.name}: {what}", _reargue(module, node, args)


def _other_arguments(node: Node) -> Iterator[tuple[str, tuple[Any, ...]]]:
    name, args = op_name(node), node.args
    if name == "slice" and len(args) > 3 and isinstance(args[2], int) and args[2] > 0:
        yield "bounds shifted", (args[0], args[1], args[2] - 1, args[3] - 1, *args[4:])
    if name in ("reshape", "view"):
        sizes = list(args[1])  # type: ignore[arg-type]
        turned = any(op_name(user) in ("transpose", "permute") for user in node.users)
        if turned and len(sizes) > 3 and sizes[-1] != sizes[-2] and 1 not in sizes[-2:]:
            yield "heads taken for channels", (args[0], [*sizes[:-2], sizes[-1], sizes[-2]])
    if name == "split_with_sizes" and args[1] != args[1][::-1]:  # type: ignore[index]
        yield "sizes swapped", (args[0], args[1][::-1], *args[2:])  # type: ignore[index]
    if name == "cat":
        yield "order turned", (args[0][::-1], *args[1:])  # type: ignore[index]
    if name in ("add", "mul") and all(isinstance(a, Node) for a in args[:2]):
        yield "second operand left out", (args[0], args[0], *args[2:])
    if name == "linear" and len(args) > 2 and args[2] is not None:
        yield "bias left out", args[:2]


def _reargue(module: GraphModule, node: Node, args: tuple[Any, ...]) -> Change:
    def change() -> None:
        node.args = args
        module.recompile()

    return change


def of_scales(module: GraphModule) -> Iterator[tuple[str, Change]]:
    """The softmax scale of attention follows the smaller head."""
    for node in module.graph.nodes:
        if op_name(node) == "scaled_dot_product_attention" and node.kwargs.get("scale"):

            def change(node: Node = node) -> None:
                node.kwargs = {**node.kwargs, "scale": None}
                module.recompile()

            yield f"%{node.name}: scale of the smaller head", change


# ---------------------------------------------------------------- mutants of the engine
def _nth(real: Callable[..., Any], number: int, other: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but its call `number` is `other`."""
    seen = iter(range(10**9))
    return lambda *a, **k: (other if next(seen) == number else real)(*a, **k)


def _shifted(self: Labels, left: Tensor, right: Tensor) -> None:
    left, right = torch.broadcast_tensors(left, right)
    wide = max(range(right.dim()), key=lambda d: right.shape[d])
    _UNITE(self, left, right.roll(1, wide))


def _carried(visit: Any) -> list[Any]:
    """An op without a rule taken for pointwise."""
    return [pointwise.meet_pointwise(visit, out) for out in visit.outs]


def _first_ones(tensor: Tensor, cuts: Any) -> Tensor:
    """The first indices instead of those that are kept."""
    for dim, mask in cuts.items():
        tensor = tensor.narrow(dim, 0, removal.count(mask, dim))
    return tensor


_UNITE, _SLICED = Labels.unite, removal.sliced
Patch = tuple[Any, str, Any]


def of_engine(module: GraphModule) -> Iterator[tuple[str, Patch]]:
    """Name and patch (object, attribute, replacement), of the ops that a graph has."""
    ops = {op_name(node) for node in module.graph.nodes}
    for n in range(12):
        yield f"union {n} dropped", (Labels, "unite", _nth(_UNITE, n, lambda *a: None))
        yield f"union {n} shifted", (Labels, "unite", _nth(_UNITE, n, _shifted))
    for n in range(6):
        patched = _nth(_SLICED, n, _first_ones)
        yield f"tensor {n} cut at its end", (rewrite, "sliced", patched)
        uncut = _nth(_SLICED, n, lambda tensor, cuts: tensor)
        yield f"tensor {n} not cut", (rewrite, "sliced", uncut)
    for name in sorted(ops & edits.EDITS.keys()):
        table = {**edits.EDITS, name: lambda edit: None}
        yield f"edit of {name} skipped", (rewrite, "EDITS", table)
    for name in sorted(ops & places.HANDLERS.keys()):
        table = {**places.HANDLERS, name: _carried}
        yield f"{name} taken for pointwise", (places, "HANDLERS", table)
    yield "blocks not united", (moves, "_unite_inside", lambda v, x, d, array, e, t: array)
    yield "no axis is frozen", (Labels, "mark", lambda *a: None)


def harmless(right: Subject, broken: Subject, model: nn.Module) -> bool:
    """Judged without verify: the mutant prunes groups of the right analysis only (fewer of them),
    or computes the right numbers, or those of the user's module with zeros where it cut.
    """
    if _prunable(broken) < _prunable(right):
        return True
    inputs = sample(7)
    found = broken.compact(inputs)
    kinds = {broken.deps[name].kind for name in broken.kept}
    references = [right.compact]
    if "width" not in kinds:
        references.append(zeroed(model, broken.deps, broken.kept))
    return any(torch.allclose(found, r(inputs), rtol=0, atol=1e-9) for r in references)


def _prunable(found: Subject) -> set[str]:
    return set(found.deps.listing().splitlines())


def same(left: Subject, right: Subject) -> bool:
    """Whether two subjects were analysed alike and compute from the same graph and numbers."""
    if left.deps.listing() != right.deps.listing() or left.compact.code != right.compact.code:
        return False
    a, b = left.compact.state_dict(), right.compact.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---------------------------------------------------------------- all of them, tried
@dataclass(frozen=True)
class Tried:
    """How many were caught, how many change nothing that counts, and which were missed."""

    caught: int
    harmless: int
    missed: list[str]


def results_tried(name: str) -> Tried:
    """Every mutant of a subject's compact graph."""
    found, makers = subject(name), (of_weights, of_nodes, of_scales)
    tried, missed = sum(len(list(make(found.compact))) for make in makers), []
    for number in range(tried):
        broken = copy.deepcopy(found.compact)
        what, change = [pair for make in makers for pair in make(broken)][number]
        with torch.no_grad():
            change()
        try:
            verified(replace(found, compact=broken))
            missed.append(f"{name}: {what}")
        except VerificationError:
            pass
    return Tried(tried - len(missed), 0, missed)


def engine_tried(name: str) -> Tried:
    """Every mutant of the engine; one that verify accepts must be seen to be harmless by a judge
    that is not verify.
    """
    right, model = subject(name), build(SUBJECTS[name])
    caught, spared, missed = 0, 0, []
    for what, (holder, attribute, other) in of_engine(right.module):
        try:
            with patch.object(holder, attribute, other):
                broken = compiled(right.module, right.inputs)
            if same(broken, right):
                continue
            verified(broken)
        except (FaspGraphError, RuntimeError, ValueError, LookupError):
            caught += 1
            continue
        if harmless(right, broken, model):
            spared += 1
        else:
            missed.append(f"{name}: {what}")
    return Tried(caught, spared, missed)
