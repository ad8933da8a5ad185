"""consumers: a group's consumers as matrices, and which of their columns belong to which unit."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from .couple import DependencyGraph, Group
from .labels import Site
from .observe import View


def views(group: Group, deps: DependencyGraph, nodes: dict[str, Node]) -> list[View]:
    """The group's consumers as matrices; empty if one of them is not a plain linear or
    convolution.
    """
    found = []
    for consumer in group.consumers:
        node = nodes[consumer.node]
        site = _site(deps, consumer.node, consumer.parameter)
        plain = not _grouped(node) and "transpose" not in str(node.target)
        if not consumer.parameter or site is None or not plain:
            return []
        source = next(o for o in site.operands if o.data)
        found.append(
            View(node, consumer.parameter, consumer.dim, nodes[source.node.name], source.dim)
        )
    return found


def _grouped(node: Node) -> bool:
    schema = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    at = schema.index("groups") if "groups" in schema else -1
    return at >= 0 and len(node.args) > at and node.args[at] != 1


def _site(deps: DependencyGraph, node: str, parameter: str) -> Site | None:
    for site in deps.labels.sites:
        if site.node.name == node and len(site.operands) == 2:
            names = [str(o.node.target) for o in site.operands if o.node.op == "get_attr"]
            if names == [parameter]:
                return site
    return None


def unit_columns(group: Group, view: View, weight: Tensor) -> Tensor:
    """[columns of the view's matrix] -> unit, -1 where the column is not the group's."""
    kernel = weight[0, 0].numel() if view.convolution else 1
    unit = torch.full((weight.shape[view.dim],), -1)
    for member in group.members:
        if (member.parameter, member.dim) == (view.parameter, view.dim):
            for number, indices in enumerate(member.indices):
                unit[list(indices)] = number
    return unit.repeat_interleave(kernel).to(weight.device)


def bias_name(view: View) -> str:
    """The parameter that the consumer adds, '' if none."""
    schema = [a.name for a in view.node.target._schema.arguments]  # type: ignore[union-attr]
    bound = dict(zip(schema, view.node.args, strict=False)) | dict(view.node.kwargs)
    bias = bound.get("self" if "addmm" in str(view.node.target) else "bias")
    return str(bias.target) if isinstance(bias, Node) and bias.op == "get_attr" else ""
