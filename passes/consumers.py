"""consumers: a group's consumers as matrices, and which of their columns belong to which unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .groups import Consumer, DependencyGraph, Group
from .observe import View
from .values import Operand, Site
from .visit import bind, op_name

# Ops that are a matrix product for the statistics, and the argument that holds X.
MATRIX = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "convolution"), "input"),
    **dict.fromkeys(("mm", "matmul"), "self"),
    "addmm": "mat1",
}
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
        if source is None or not _plain(node, source, len(deps.parameters[consumer.parameter])):
            return []
        name, dim = nodes[source.node.name], source.dim
        found.append(View(node, consumer.parameter, consumer.dim, name, dim))
    return found


def _plain(node: Node, source: Operand, rank: int) -> bool:
    """Y = X W^T with X first and a matrix W, or a convolution in one group."""
    first = MATRIX.get(op_name(node))
    bound = bind(node, node.args, node.kwargs)
    if first is None or bound[first] is None or bound[first].name != source.node.name:
        return False
    return bound.get("groups", 1) == 1 if first == "input" and rank > 2 else rank == 2


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
    kernel = weight[0, 0].numel() if view.convolution else 1
    unit = torch.full((weight.shape[view.dim],), -1)
    for member in group.members:
        if (member.parameter, member.dim) == (view.parameter, view.dim):
            unit[torch.from_numpy(member.indices)] = torch.arange(group.size)[:, None]
    return unit.repeat_interleave(kernel).to(weight.device)


def bias_name(view: View) -> str:
    """The parameter that the consumer adds, '' if none."""
    schema = [a.name for a in view.node.target._schema.arguments]  # type: ignore[union-attr]
    bound = dict(zip(schema, view.node.args, strict=False)) | dict(view.node.kwargs)
    bias = bound.get("self" if "addmm" in str(view.node.target) else "bias")
    return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else ""
