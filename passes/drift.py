"""drift: how far the pruned path has moved from the dense one, seen at a consumer.

The dense model runs beside the walk (one more forward pass). At a consumer Y = X W^T the target is
what the dense model has there,

    asymmetric   t = W x_d                    x_d: the dense path's input of the same token
    residual     t = W x_d + (r_d - r_p)      r: the other summand of the addition that follows

and Drift holds the cross-moments of t - W x_p with x_p, which is all that a least-squares refit
towards t needs. `residual` lets a block repay the error of the residual stream that it adds to.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .fakes import unknowns
from .observe import Walk, begun, forked, last_reads
from .room import Room
from .views import View

_RELAYS = {
    torch.ops.aten.reshape.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.contiguous.default,
}


@dataclass(frozen=True)
class Drift:
    """cross = sum (t - W x)^T x [out, in]; mean of t - W x [out]; number of tokens."""

    cross: Tensor
    mean: Tensor
    tokens: int


@dataclass
class Twin:
    """The dense path, always run up to the node that the walk stands before."""

    walk: Walk
    nodes: list[Node]
    over: dict[Node, list[Node]]
    done: int = field(default=0)

    @torch.no_grad()
    def advance(self, until: Node) -> list[dict[Node, Any]]:
        """Run up to `until`, itself excluded; the live values of each batch."""
        end = self.nodes.index(until, self.done)
        self.walk.run(self.nodes[self.done : end], self.over)
        self.done, self.walk.here = end, self.walk.places.get(until)
        return self.walk.environments

    @torch.no_grad()
    def outputs(self, number: int) -> list[Tensor]:
        """The dense model's floating-point outputs for one batch: the rest of its run."""
        here = self.walk
        rest = replace(here, environments=[forked(here.environments[number])])
        rest.room = here.room.unbounded
        rest.run(self.nodes[self.done :], self.over)
        (end,) = (node for node in here.module.graph.nodes if node.op == "output")
        leaves = pytree.tree_map(
            lambda a: rest.value(rest.environments[0], a) if isinstance(a, Node) else a,
            end.args,
            is_leaf=lambda a: isinstance(a, Node),
        )
        found = [x for x in pytree.tree_leaves(leaves) if isinstance(x, Tensor)]
        return [x for x in found if x.is_floating_point()]


def twin(module: GraphModule, batches: Iterable[Args], room: Room | None = None) -> Twin:
    """A dense path at the start of the graph."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return Twin(begun(module, batches, room), nodes, last_reads(module))


@torch.no_grad()
def drift(state: Walk, dense: Twin, view: View, residual: bool) -> Drift | None:
    """Cross-moments of target minus output at the consumer that the walk stands before; None where
    data decide how many rows it sees (a router), since the two paths may send it other tokens.
    """
    if unknowns(view.node.meta.get("val")):
        return None
    environments_ = dense.advance(view.node)
    weight = state.weight(view.parameter)
    now = view.matrix(weight).double()
    then = view.matrix(dense.walk.weight(view.parameter)).double()
    other = summand(view.node) if residual else None
    cross = torch.zeros_like(now)
    mean = now.new_zeros(len(now))
    tokens = 0
    for here, there in zip(state.environments, environments_, strict=True):
        x = view.rows(state.value(here, view.source), weight).float()
        x_dense = view.rows(dense.walk.value(there, view.source), weight).float()
        cross += then @ (x_dense.T @ x).double() - now @ (x.T @ x).double()
        mean += then @ x_dense.sum(0).double() - now @ x.sum(0).double()
        tokens += len(x)
        if other is not None and other in here and other in there:
            both = dense.walk.value(there, other) - state.value(here, other)
            gap = rows_of(both, view, len(x), len(now))
            if gap is not None:
                cross += (gap.T @ x).double()
                mean += gap.sum(0).double()
    cross, mean = state.room.total(cross), state.room.total(mean)
    tokens = int(state.room.sums(tokens)[0])
    return Drift(cross, mean / tokens, tokens)


def summand(node: Node) -> Node | None:
    """What the consumer's output is added to, if nothing but relays lies between."""
    here = node
    while len(here.users) == 1:
        user = next(iter(here.users))
        if user.target is torch.ops.aten.add.Tensor and not user.kwargs:
            others = [arg for arg in user.args if arg is not here]
            return others[0] if len(others) == 1 and isinstance(others[0], Node) else None
        if user.target not in _RELAYS:
            return None
        here = user
    return None


def rows_of(gap: Any, view: View, tokens: int, out: int) -> Tensor | None:
    """The residual's gap as [tokens, out]; None if it has another layout."""
    if not isinstance(gap, Tensor) or gap.dim() < 2:
        return None
    rows = view.outputs(gap) if not view.convolution or gap.dim() > 2 else gap
    return rows.float() if rows.shape == (tokens, out) else None
