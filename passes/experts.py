"""experts: the units inside experts (or heads) whose weights lie stacked, one matrix for each.

    f(W_1, .., W_E) = f(P_1 W_1, .., P_E W_E)      P_e: any permutation of the units of expert e

holds where nothing but the experts' own weights tells the units of one expert from those of
another. A group of such units keeps the same positions in all experts; so each expert first puts
the units that it shall keep in front, and then all lose the positions behind. That the law holds is
tried on the model, with random permutations, before anything relies on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .capture import Args
from .consumers import TURNS
from .groups import Consumer, DependencyGraph, Group, Member
from .observe import Moments, Walk, add_gram, check_finite, fold, mirror, summable
from .unchanged import unchanged
from .visit import bind, op_name

Orders = dict[str, list[list[int]]]
"""group -> for each expert, its units: those that stay, then the others"""


@dataclass(frozen=True)
class ExpertView:
    """A consumer of one group: Y_s = X_s W_e(s)^T for places s, with W [E, out, in] after
    `matrices`. `picks`: the nodes that take W_e(s) for all s, before this one.
    """

    node: Node
    parameter: str
    dim: int
    source: Node
    source_dim: int
    picks: tuple[Node, ...]

    @property
    def ids(self) -> Node:
        """e(s)."""
        found = _ids(self.picks[0])
        assert found is not None
        return found

    def matrices(self, weight: Tensor) -> Tensor:
        """The weight as [E, out, in]."""
        return weight.movedim(self.dim, -1)

    def weight(self, matrices: Tensor) -> Tensor:
        """The inverse of `matrices`."""
        return matrices.movedim(-1, self.dim).contiguous()

    def moments(self, state: Walk, part: int | None = None) -> list[Moments]:
        """Of each expert, over the places that are its own, or a part of them (`fold`)."""
        shape = state.held(self.parameter).shape
        experts, width = shape[0], shape[self.dim]
        counts = []
        for ids, rows in (self._sent(state, environment) for environment in state.environments):
            each, device = torch.arange(experts, device=ids.device)[:, None], rows.device
            counts.append((ids == each).sum(1) * rows.shape[1])
        before = state.room.ahead(torch.stack(counts).cpu()).tolist()
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        gram, total = zeros(experts, width, width), zeros(experts, width)
        count = torch.zeros(experts, dtype=torch.long, device=device)
        for environment, seen in zip(state.environments, before, strict=True):
            ids, rows = self._sent(state, environment)
            for expert in range(experts):
                own = rows[ids == expert].flatten(0, 1)
                mine = summable(fold(own, seen[expert], part))
                add_gram(gram[expert], mine)
                total[expert] += mine.sum(0, dtype=torch.float32)
                count[expert] += len(mine)
        for one in gram:
            mirror(one)
        gram, total, count = (state.room.total(held) for held in (gram, total, count))
        check_finite(self, gram)
        means = total / count.clamp_min(1)[:, None]
        return [Moments(*of_one) for of_one in zip(gram, means, count.tolist(), strict=True)]

    def _sent(self, state: Walk, environment: dict[Node, Any]) -> tuple[Tensor, Tensor]:
        """Of a batch e(s), and X as [places, rows of a place, in]."""
        ids = state.value(environment, self.ids).reshape(-1)
        rows = state.value(environment, self.source).movedim(self.source_dim, -1).flatten(1, -2)
        return ids, rows


def stacked(group: Group, deps: DependencyGraph) -> bool:
    """Whether every member holds the group's units once for each of several experts (or heads)."""
    if group.kind != "chain" or group.blocks > 1 or not group.consumers:
        return False
    shapes = [deps.parameters.get(m.parameter, ()) for m in group.members]
    first = {
        shape[0] if shape and m.dim else 1 for m, shape in zip(group.members, shapes, strict=True)
    }
    return len(first) == 1 and first != {1}


def independent(
    module: GraphModule, groups: Sequence[Group], deps: DependencyGraph, inputs: Args, seed: int
) -> list[Group]:
    """The groups for which the law was seen to hold at the example inputs."""
    found = [group for group in groups if stacked(group, deps)]
    if not found or _holds(module, found, deps, inputs, seed):
        return found
    return [group for group in found if _holds(module, [group], deps, inputs, seed)]


def _holds(
    module: GraphModule, groups: Sequence[Group], deps: DependencyGraph, inputs: Args, seed: int
) -> bool:
    draw = np.random.default_rng(seed)
    orders = {
        group.name: [draw.permutation(group.size).tolist() for _ in range(_experts(group, deps))]
        for group in groups
    }
    return unchanged(module, moved(groups, orders), inputs)


def _experts(group: Group, deps: DependencyGraph) -> int:
    return deps.parameters[group.members[0].parameter][0]


def moved(groups: Sequence[Group], orders: Orders) -> dict[str, Callable[[Tensor], Tensor]]:
    """Parameter -> what puts the units of its experts in order."""
    found: dict[str, list[tuple[Member, list[list[int]]]]] = {}
    for group in groups:
        for member in group.members if group.name in orders else ():
            found.setdefault(member.parameter, []).append((member, orders[group.name]))

    def move(steps: list[tuple[Member, list[list[int]]]]) -> Callable[[Tensor], Tensor]:
        def moved(weight: Tensor) -> Tensor:
            for member, order in steps:
                weight = arranged(weight, member, order)
            return weight

        return moved

    return {name: move(steps) for name, steps in found.items()}


def arranged(weight: Tensor, member: Member, order: list[list[int]]) -> Tensor:
    """Place u of expert e is taken by its unit order[e][u]."""
    places = np.tile(np.arange(weight.shape[member.dim]), (len(order), 1))
    places[:, member.indices.reshape(-1)] = member.indices[np.array(order)].reshape(len(order), -1)
    shape = [1] * weight.dim()
    shape[0], shape[member.dim] = places.shape
    index = torch.from_numpy(places).reshape(shape).expand(weight.shape).to(weight.device)
    return weight.gather(member.dim, index)


def expert_view(group: Group, deps: DependencyGraph, nodes: dict[str, Node]) -> ExpertView | None:
    """The group's only consumer, if it is a product with weights that an index picked."""
    if len(group.consumers) != 1:
        return None
    (consumer,) = group.consumers
    for site in deps.layers[group.layer].labels.sites:
        if site.node.name != consumer.node or len(site.operands) != 2:
            continue
        weights = [o for o in site.operands if not o.data]
        inputs = [o for o in site.operands if o.data]
        picks = _picks(weights[0].node, consumer) if len(weights) == 1 and inputs else []
        if picks and inputs[0].dim > 0 and op_name(site.node) == "bmm":
            source = nodes[inputs[0].node.name]
            where = (consumer.parameter, consumer.dim, source, inputs[0].dim)
            steps = tuple(nodes[pick.name] for pick in picks)
            return ExpertView(nodes[consumer.node], *where, steps)
    return None


def _picks(node: Node, consumer: Consumer) -> list[Node]:
    """The nodes from the index that picks matrices of the consumer's weight to what is multiplied;
    empty if there is none.
    """
    found = [node]
    while node.op == "call_function" and op_name(node) in TURNS:
        node = node.args[0]  # type: ignore[assignment]
        found.append(node)
    if node.op != "call_function" or op_name(node) not in ("index", "index_select"):
        return []
    held = node.args[0]
    ours = isinstance(held, Node) and held.op == "get_attr" and held.target == consumer.parameter
    return found[::-1] if ours and _ids(node) is not None else []


def _ids(pick: Node) -> Node | None:
    """The index along dim 0 of the weight, if that is the only one."""
    bound = bind(pick, pick.args, pick.kwargs)
    given = bound["indices"] if "indices" in bound else [bound["index"]] * (bound["dim"] == 0)
    return given[0] if len(given) == 1 and isinstance(given[0], Node) else None
