"""gates: what is gone under a mean is zero there, and a walk must see that.

A group's axis may pass a norm by mean squares on its way to the consumer. Its statistic loses what
the removed units gave, so that the units that stay grow, token by token. In the program that is
walked, every such mean reads its operand times a gate, a buffer that is true everywhere; whoever
removes units closes their places, and runs again what comes after. The consumer, repaired for
inputs X_K, then sees larger X'_K, and takes off what they grew on average:

    W *= ||X_K||_F / ||X'_K||_F
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .edit import register
from .groups import DependencyGraph, Group
from .observe import Moments, Walk
from .removal import nodes_by_name, removal
from .skeleton import shared_copy
from .values import Site
from .views import View

aten = torch.ops.aten


@dataclass(frozen=True)
class Gate:
    """A buffer of the gated program, the labels (of a run of propagation) at its places, and the
    node that multiplies with it.
    """

    name: str
    layer: int
    labels: Tensor
    node: Node

    def closed(self, deps: DependencyGraph, group: Group, kept: Sequence[int]) -> Tensor:
        """False where a unit of the group is gone."""
        return removal(deps, {group.name: kept}).mask(self.labels, self.layer)


Gates = dict[str, list[Gate]]


def gated(
    module: GraphModule, groups: Sequence[Group], deps: DependencyGraph
) -> tuple[GraphModule, Gates]:
    """The program with gates, its weights shared with `module`, and the gates of each group that
    has any; `module` itself if none has.
    """
    gates: Gates = {}
    wanted = [group for group in groups if group.means]
    if not wanted:
        return module, gates
    module = shared_copy(module)
    nodes = nodes_by_name(module.graph.nodes)
    for group in wanted:
        for site in _sites(group, deps):
            gate = _insert(module, nodes[site.node.name], site, group, f"_gate_{len(gates)}")
            gates.setdefault(group.name, []).append(gate)
    module.recompile()
    return module, gates


def _sites(group: Group, deps: DependencyGraph) -> list[Site]:
    names = {mean.node for mean in group.means}
    sites = deps.layers[group.layer].labels.sites
    return [site for site in sites if site.mean and site.node.name in names]


def _insert(module: GraphModule, node: Node, site: Site, group: Group, prefix: str) -> Gate:
    """A gate before the operand of a mean."""
    side = site.operands[0]
    name = f"{prefix}_{node.name}_{side.dim}"
    register(module, name, torch.ones(side.labels.shape, dtype=torch.bool))
    source = node.args[0]
    with module.graph.inserting_before(node):
        held = module.graph.get_attr(name)
        made = module.graph.call_function(aten.mul.Tensor, (source, held))
    node.replace_input_with(source, made)
    return Gate(name, group.layer, side.labels, made)


def level(view: View, dense: Moments, state: Walk) -> None:
    """Scale a repaired consumer, given the moments of its inputs before gates were closed."""
    now, weight = state.moments(view), state.weight(view.parameter).detach()
    matrix = view.matrix(weight)
    stays = matrix.any(0)
    before, after = (float(held.gram.diagonal()[stays].sum()) for held in (dense, now))
    if after > 0:
        scale = (before / dense.tokens / (after / now.tokens)) ** 0.5
        state.weights[view.parameter] = view.weight(matrix * scale, weight)


def behind(module: GraphModule, gates: Sequence[Gate], stop: Node) -> list[Node]:
    """The nodes before `stop` whose results a gate changes, in order."""
    if not gates:
        return []
    first, found = {gate.node for gate in gates}, dict[Node, None]()
    for node in module.graph.nodes:
        if node is stop:
            break
        if node in first or any(arg in found for arg in node.all_input_nodes):
            found[node] = None
    return list(found)
