"""layers: which MLP and attention layers of a captured graph have a chain group of their own.

    MLP layer        a weight's contraction whose input comes from another weight's contraction
                     through pointwise ops, one of them not linear, and through nothing else
    attention layer  a fused attention op, or a product with a softmax as its left operand

Read off the graph; no module names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import GraphModule, Node

from passes.groups import DependencyGraph, Group
from passes.values import Value
from passes.visit import bind, op_name

CONTRACTIONS = {"linear", "addmm", "mm", "conv1d", "conv2d", "conv3d"}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


CURVED = _words(
    "relu gelu silu sigmoid tanh hardtanh hardswish hardsigmoid mish elu leaky_relu softplus relu6 "
    "pow square exp erf where clamp"
)
PASSING = CURVED | _words(
    "mul div neg reshape view permute transpose contiguous clone to dropout slice split chunk "
    "split_with_sizes batch_norm unbind squeeze unsqueeze flatten select getitem gt lt ge le rsub "
    "abs log1p expm1"
)
SUMS = _words("add sub")
PRODUCTS = {"matmul", "bmm", "einsum"}


@dataclass(frozen=True)
class Layers:
    """How many layers of each kind have a chain group, of how many; why the others have none."""

    counts: dict[str, list[int]]
    without: dict[str, dict[str, int]]


def layers_with_chains(module: GraphModule, deps: DependencyGraph) -> Layers:
    """counts {"mlp": [with a chain group, all], "attention": [...]}; without {"mlp": {reason:
    number of layers}, ...}
    """
    inner = {
        "mlp": [(node, _inner(node, deps)) for node in _mlp_outputs(module, deps)],
        "attention": [(n, _labels(deps, v, -1)) for n, v in _attention_values(module)],
    }
    consumers = {c.node for g in deps.groups if g.kind == "chain" for c in g.consumers}
    counts, without = {}, {}
    for kind, layers in inner.items():
        found = [_reason(deps, node.name in consumers, units) for node, units in layers]
        counts[kind] = [found.count(""), len(found)]
        without[kind] = dict(Counter(reason for reason in found if reason))
    return Layers(counts, without)


def _reason(deps: DependencyGraph, consumes: bool, units: set[int]) -> str:
    """'' where the axis of a layer is a chain; else what holds it."""
    groups = [g for g in deps.groups if not g.layer and units & set(g.components.tolist())]
    if consumes or any(g.kind == "chain" for g in groups):
        return ""
    held = [f"{g.kind}, {re.sub(' · .*', '', g.reason) or _summed(g)}" for g in groups]
    return held[0] if held else "a dim of one position"


def _summed(group: Group) -> str:
    """The ops that sum a group away which is no chain: no weight meets an activation there."""
    names = {re.sub(r"_\d+$", "", consumer.node) for consumer in group.consumers}
    return f"summed by {', '.join(sorted(names))} of two values that are both computed"


def _inner(node: Node, deps: DependencyGraph) -> set[int]:
    """The units on the axis that a contraction sums away."""
    bound = bind(node, node.args, node.kwargs)
    weight = bound.get("weight")
    rank = len(deps.labels.values[weight].shape) if isinstance(weight, Node) else 2
    return _labels(deps, _operand(node), -1 if op_name(node)[:4] != "conv" else 1 - rank)


def _labels(deps: DependencyGraph, node: Node, dim: int) -> set[int]:
    """The units along a dim of a value."""
    held = deps.labels.values.get(node)
    if not isinstance(held, Value):
        return set()
    array = held.arrays.get(dim % len(held.shape))
    if array is None:
        return set()
    return set(deps.layers[0].component[array.reshape(-1).numpy()].tolist())


def _mlp_outputs(module: GraphModule, deps: DependencyGraph) -> Iterator[Node]:
    known: dict[Node, Traced] = {}
    for node in module.graph.nodes:  # in order: what a node needs is known before it
        contracts = op_name(node) in CONTRACTIONS and not _is_depthwise(node, deps)
        known[node] = _traced(node, known, contracts)
        source = _operand(node) if contracts else None
        if isinstance(source, Node) and known[source].sources and known[source].curved:
            yield node


def _operand(node: Node) -> Any:
    """What a contraction reads: the first argument, but of addmm, whose first is the bias."""
    return node.args[1 if op_name(node) == "addmm" else 0]


def _is_depthwise(node: Node, deps: DependencyGraph) -> bool:
    """A convolution of each channel by itself sums nothing away."""
    bound = bind(node, node.args, node.kwargs)
    groups = bound.get("groups") or 1
    if isinstance(groups, Node):  # as many as samples: each has a kernel of its own
        return False
    return groups > 1 and deps.labels.values[bound["weight"]].shape[1] == 1


@dataclass(frozen=True)
class Traced:
    """The weight contractions that a value is made from by pointwise ops (none: by others too),
    and whether one of those ops is curved.
    """

    sources: frozenset[Node] = frozenset()
    curved: bool = False


def _traced(node: Node, known: dict[Node, Traced], contracts: bool) -> Traced:
    name = op_name(node).rstrip("_")
    if contracts:
        return Traced(frozenset([node]))
    data = [known[arg] for arg in node.all_input_nodes]
    found = [traced for traced in data if traced.sources]
    if not found or name not in PASSING | SUMS | CONTRACTIONS:
        return Traced()
    if name in SUMS and len({traced.sources for traced in found}) > 1:
        return Traced()  # a residual: the axis is not this layer's own
    if name in SUMS and any(not t.sources and _is_data(a) for t, a in _pairs(data, node)):
        return Traced()
    sources = frozenset().union(*(traced.sources for traced in found))
    return Traced(sources, name in CURVED or any(traced.curved for traced in found))


def _pairs(data: list[Traced], node: Node) -> Iterator[tuple[Traced, Node]]:
    return zip(data, node.all_input_nodes, strict=True)


def _is_data(node: Node) -> bool:
    """Whether the value depends on an input (a weight or a constant does not)."""
    pending, seen = [node], set()
    while pending:
        at = pending.pop()
        if at.op == "placeholder":
            return True
        seen.add(at)
        pending += [arg for arg in at.all_input_nodes if arg not in seen]
    return False


def _attention_values(module: GraphModule) -> Iterator[tuple[Node, Node]]:
    """(attention node, its value operand)"""
    for node in module.graph.nodes:
        name = op_name(node)
        if "scaled_dot_product" in name:
            yield node, node.args[2]
        elif name in PRODUCTS and _is_softmax(node.args[0], 0):
            operands = node.args[1] if name == "einsum" else node.args
            yield node, operands[1]


def _is_softmax(node: Any, depth: int) -> bool:
    if not isinstance(node, Node):
        return False
    if op_name(node) in ("softmax", "_softmax"):
        return True
    moves = ("dropout", "to", "reshape", "view", "expand", "clone", "contiguous", "slice")
    return depth < 6 and op_name(node) in moves and _is_softmax(node.args[0], depth + 1)
