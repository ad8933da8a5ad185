"""sensitivity: the statistics of every consumer on the dense model, and what an error there costs.

For a consumer's output y and the model's outputs f, to first order f moves by J dy. With z drawn
from N(0, 1) per element of f, g = J^T z has E[g g^T] = J^T J, so

    A = sum_t g_t g_t^T / tokens   [out, out]        E|J dy|^2 = tr(dy A dy^T) per token

A is the metric in which errors at different consumers are comparable: it says how much of dy
reaches the outputs. Each output tensor is divided by its root mean square first, so A needs no
loss, no labels and no unit. One backward pass yields A for all consumers at once, without gradients
of any weight; it counts as two forward passes. The estimator is Hutchinson's, as in Gauss-Newton
sketches (Martens 2010, 2014); as a metric of pruning it is Fisher pruning (arXiv 2203.16487, whose
loss gradients it replaces by output probes).
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import cosine_similarity
from torch.utils import _pytree as pytree

from .capture import Args
from .drift import rows_of, summand
from .errors import CalibrationError
from .observe import (
    Moments,
    backward,
    called,
    check_finite,
    environments,
    last_reads,
    tap,
)
from .room import Room
from .views import View

Read = Callable[[str], Any]
Watch = Callable[[Node, Callable[[Any], Any], Any], Any]


@dataclass(frozen=True)
class Sensed:
    """Moments of a consumer's input, A of its output (None: no gradient reaches it, or no token),
    and the mean cosine between the residual stream before and after the output is added to it
    (None: it is not).
    """

    moments: Moments
    metric: Tensor | None
    cosine: float | None = None


@dataclass
class _Sums:
    gram: Tensor
    total: Tensor
    metric: Tensor
    tokens: int = 0
    reached: bool = False
    cosine: float = 0.0
    added: int = 0


def sense(
    module: GraphModule,
    batches: Sequence[Args],
    views: Iterable[View],
    seed: int,
    metric: bool,
    room: Room | None = None,
) -> dict[str, Sensed]:
    """Consumer node name -> Sensed. Batches run one after the other; `metric` asks for A. `room`:
    of several processes each runs one at a time, and some may have one less, or none.
    """
    room = room or Room()
    sites = {view.node: view for view in views}
    sums = {view.node.name: _nothing(module, view) for view in sites.values()}
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    generator = torch.Generator(device).manual_seed(seed)
    (count,) = room.sums(len(batches))
    if sites and not count:
        raise CalibrationError("calibration is empty · help: give at least one batch of inputs")
    own = environments(module, batches)
    for _ in range(0, int(count), room.size):
        one = next(own, None)
        with room.agreed(), torch.set_grad_enabled(metric):
            leaves, outputs = ([], []) if one is None else _run(module, one, sites, sums, metric)
        if metric:
            _backward(leaves, outputs, generator, room)
    found = {}
    for view in sites.values():
        s = _together(sums.pop(view.node.name), room)
        check_finite(view, s.gram, s.metric)
        tokens = max(s.tokens, 1)
        moments = Moments(s.gram, s.total / tokens, s.tokens)
        found[view.node.name] = Sensed(
            moments,
            s.metric / tokens if s.reached and s.tokens else None,
            s.cosine / s.added if s.added else None,
        )
    return found


def _nothing(module: GraphModule, view: View) -> _Sums:
    """The sums of no batch."""
    weight = operator.attrgetter(view.parameter)(module).detach()
    out, size = view.matrix(weight).shape
    zeros = [weight.new_zeros(s, dtype=torch.float32) for s in ((size, size), (size,), (out, out))]
    return _Sums(*zeros)


def _together(s: _Sums, room: Room) -> _Sums:
    """The sums of all processes."""
    gram, total, metric = (room.total(held) for held in (s.gram, s.total, s.metric))
    tokens, reached, cosine, added = room.sums(s.tokens, s.reached, s.cosine, s.added)
    return _Sums(gram, total, metric, int(tokens), reached > 0, cosine, int(added))


def factor(metric: Tensor, damping: float = 1e-4) -> Tensor:
    """L^T [out, out] with L L^T = A + damping * mean(diag A): maps errors into A's norm."""
    a = metric.double()
    floor = damping * a.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    identity = torch.eye(len(a), dtype=a.dtype, device=a.device)
    return torch.linalg.cholesky(a + floor * identity).T


def run(
    module: GraphModule, environment: dict[Node, Any], read: Read, watch: Watch | None = None
) -> list[Tensor]:
    """Run one batch with the weights that `read` gives; its floating-point outputs. `watch(node,
    value, result)` gives the result to go on with; `value(node)`: an argument of the node.
    """

    def value(node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        return read(str(node.target)) if node.op == "get_attr" else environment[node]

    over = last_reads(module)
    for node in module.graph.nodes:
        if node.op == "output":
            leaves = pytree.tree_leaves(pytree.tree_map(value, node.args, is_leaf=_is_node))
            return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
        if node.op != "call_function":
            continue
        args, kwargs = pytree.tree_map(value, (node.args, node.kwargs), is_leaf=_is_node)
        result = called(node, args, kwargs)
        environment[node] = watch(node, value, result) if watch else result
        for gone in over.get(node, ()):
            environment.pop(gone, None)
    return []


def _run(
    module: GraphModule,
    environment: dict[Node, Any],
    sites: dict[Node, View],
    sums: dict[str, _Sums],
    metric: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Run one batch, the consumers' outputs tapped; the leaves of the backward pass, and the
    model's outputs.
    """
    leaves: list[Tensor] = []

    def read(name: str) -> Any:
        found = operator.attrgetter(name)(module)
        return found.detach() if isinstance(found, Tensor) else found

    def watch(node: Node, value: Any, result: Any) -> Any:
        if node not in sites:
            return result
        _accumulate(sums, sites[node], value, result, environment)
        if not metric:
            return result
        return tap(result, leaves, functools.partial(_add, sums[node.name], sites[node]))

    return leaves, run(module, environment, read, watch)


def _add(sums: _Sums, view: View, gradient: Tensor) -> None:
    rows = view.outputs(gradient).to(torch.float32)
    sums.metric.addmm_(rows.T, rows)
    sums.reached = True


def _accumulate(
    sums: dict[str, _Sums],
    view: View,
    value: Any,
    result: Tensor,
    environment: dict[Node, Any],
) -> None:
    weight = operator.attrgetter(view.parameter)(view.node.graph.owning_module).detach()
    rows = view.rows(value(view.source).detach(), weight).to(torch.float32)
    s = sums[view.node.name]
    s.gram.addmm_(rows.T, rows)
    s.total += rows.sum(0)
    s.tokens += len(rows)
    other = summand(view.node)
    before = environment.get(other) if other is not None else None
    after = view.outputs(result.detach())
    stream = rows_of(before, view, len(rows), after.shape[1])
    if stream is not None:
        s.cosine += float(cosine_similarity(stream, stream + after.float()).detach().sum())
        s.added += len(rows)


def _backward(
    leaves: list[Tensor], outputs: list[Tensor], generator: torch.Generator, room: Room
) -> None:
    """J^T z of every tapped result, z a random vector for each output."""
    reached = [output for output in outputs if output.requires_grad]
    turns = room.in_turn(generator)
    slopes = [_slope(held, generator) for mine in turns if mine for held in reached]
    with room.agreed():
        if reached:
            backward(reached, slopes, leaves)


def _slope(output: Tensor, generator: torch.Generator) -> Tensor:
    """z, for an output that is divided by its root mean square."""
    z = torch.randn(output.shape, generator=generator, device=generator.device).to(output)
    scale = output.detach().float().square().mean().sqrt().clamp_min(1e-12)
    return (z / scale).to(output)


def _is_node(item: Any) -> bool:
    return isinstance(item, Node)
