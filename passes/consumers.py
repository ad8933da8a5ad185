"""consumers: a group's consumers as matrices, and which of their columns belong to which unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .groups import Consumer, DependencyGraph, Group
from .rewrite import attribute
from .values import Operand, Site
from .views import View
from .visit import bind, op_name

# Ops that are a matrix product for the statistics, and the argument that holds X.
MATRIX = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), "input"),
    **dict.fromkeys(("mm", "matmul"), "self"),
    "addmm": "mat1",
}
WEIGHTS = ("weight", "mat2", "other")
BATCH_NORMS = {"batch_norm", "_native_batch_norm_legit_no_training"}
TURNS = {"t", "transpose", "permute", "numpy_T", "mT", "clone", "contiguous"}


def views(group: Group, deps: DependencyGraph, nodes: dict[str, Node]) -> list[View]:
    """The group's consumers as matrices; empty if one of them is not a plain linear or
    convolution.
    """
    found = []
    sites = deps.layers[group.layer].labels.sites
    for consumer in group.consumers:
        node = nodes[consumer.node]
        source = _source([s for s in sites if s.node.name == consumer.node], consumer, deps)
        shape = deps.parameters.get(consumer.parameter, ())  # a buffer is not refitted
        if source is None or not _plain(node, source.node.name, len(shape)):
            return []
        name, dim = nodes[source.node.name], source.dim
        found.append(View(node, consumer.parameter, consumer.dim, name, dim))
    return found


def linears(module: GraphModule) -> Iterator[View]:
    """The linear layers and convolutions in one group whose weight has no other use."""
    held = {
        node: attribute(module, str(node.target))
        for node in module.graph.nodes
        if node.op == "get_attr"
    }
    uses = Counter[int]()
    for at, value in held.items():
        uses[id(value)] += len(at.users)
    for node in module.graph.nodes:
        if op_name(node) not in MATRIX:
            continue
        first, bound = MATRIX[op_name(node)], bind(node, node.args, node.kwargs)
        x, at = bound[first], next(bound[name] for name in WEIGHTS if name in bound)
        weight = held.get(at)
        if not isinstance(weight, nn.Parameter) or uses[id(weight)] > 1 or not isinstance(x, Node):
            continue
        if _plain(node, x.name, weight.dim()):
            dim = 1 - weight.dim() if weight.dim() > 2 else -1  # channels, of one sample too
            yield View(node, str(at.target), int(first == "input"), x, dim)


def _plain(node: Node, source: str, rank: int) -> bool:
    """Y = X W^T with X first and a matrix W, or a convolution in one group."""
    first = MATRIX.get(op_name(node))
    bound = bind(node, node.args, node.kwargs)
    if first is None or bound[first] is None or bound[first].name != source:
        return False
    if first == "input" and rank > 2:
        return bound.get("groups", 1) == 1 and not bound.get("transposed")
    return rank == 2


def _source(sites: list[Site], consumer: Consumer, deps: DependencyGraph) -> Operand | None:
    """The activation that a consumer sums against its whole weight, read where it stands."""
    for site in sites:
        weights = [o for o in site.operands if not o.data]
        if len(site.operands) != 2 or len(weights) != 1:
            continue
        at = weights[0].node
        while at.op == "call_function" and op_name(at) in TURNS:
            at = at.args[0]  # type: ignore[assignment]
        if at.op == "get_attr" and str(at.target) == consumer.parameter:
            return next(o for o in site.operands if o.data)
    return None


def unit_columns(group: Group, view: View, weight: Tensor) -> Tensor:
    """[columns of the view's matrix] -> unit, -1 where the column is not the group's."""
    kernel = weight.shape[2:].numel() if view.convolution else 1
    unit = units_along(group, view.parameter, view.dim, weight)
    return unit.repeat_interleave(kernel)


def units_along(group: Group, parameter: str, dim: int, weight: Tensor) -> Tensor:
    """Position along a weight's dim -> unit, -1 where it is not the group's."""
    unit = torch.full((weight.shape[dim],), -1)
    for member in group.members:
        if (member.parameter, member.dim) == (parameter, dim):
            unit[torch.from_numpy(member.indices)] = torch.arange(group.size)[:, None]
    return unit.to(weight.device)


def staying(group: Group, kept: Iterable[int], unit: Tensor) -> Tensor:
    """Which columns stay, for columns of the given units: those of kept ones, and of no unit."""
    stays = torch.zeros(group.size + 1, dtype=torch.bool)
    stays[[*kept, group.size]] = True
    return stays.to(unit.device)[unit]


@dataclass(frozen=True)
class Offset:
    """What is added to a consumer's product, `sign` times the named parameter or buffer."""

    name: str
    sign: int

    def read(self, value: Tensor) -> Tensor:
        """The offset of the stored value, and the stored value of the offset."""
        return value if self.sign > 0 else -value


def offset_of(view: View) -> Offset | None:
    """The consumer's bias; without one, the running mean that a batch norm in inference takes off
    its output: (W x - mean) / std. None if neither.
    """
    bound = bind(view.node, view.node.args, view.node.kwargs)
    bias = bound.get("self" if op_name(view.node) == "addmm" else "bias")
    if isinstance(bias, Node):
        return Offset(str(bias.target), 1) if bias.op == "get_attr" else None
    users = list(view.node.users)
    if len(users) != 1 or op_name(users[0]) not in BATCH_NORMS:
        return None
    bound = bind(users[0], users[0].args, users[0].kwargs)
    mean = bound["running_mean"]
    if bound.get("training") or not isinstance(mean, Node) or mean.op != "get_attr":
        return None
    holders = [n for n in view.node.graph.nodes if n.op == "get_attr" and n.target == mean.target]
    alone = bound["input"] is view.node and sum(len(n.users) for n in holders) == 1
    return Offset(str(mean.target), -1) if alone else None
