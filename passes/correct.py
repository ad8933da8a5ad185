"""correct: one damped Newton step of all consumers at once, seen from the model's outputs.

The walk repairs consumer by consumer. What is left is a distance of the whole pruned model f_W from
the dense one f over tokens t,

    D(W) = sum_t d(f(t), f_W(t))

    d = KL(softmax f || softmax f_W)    for outputs as wide as the vocabulary that the inputs index
    d = ||f - f_W||^2 / (2 mean f^2)    for any other outputs

At a consumer y = W x, with x and g = dD/dy per token, kept columns K, N tokens:

    G = sum g x^T [out, in],   S = sum x x^T / N,   A = sum g g^T / N [out, out]
    step_K = -(A + a I)^-1 (G_:K / N) (S_KK + s I)^-1,   a, s relative to the mean diagonal

which is Newton's step where the Hessian is A (x) S (K-FAC, arXiv 1503.05671; A from the gradients
themselves). It ignores that all consumers repay the same error, so it is taken only in part:
W += rate * step. The rates tried are shares of the one at which the slope alone would bring D to
zero, and the one of least D on held-out rows is taken; none, if none lowers D there. A bias is one
more column of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .capture import Args
from .consumers import Offset
from .observe import environments, gradients
from .rewrite import attribute
from .sensitivity import run
from .views import View
from .visit import bind, op_name

SHARES = (0.25, 0.5, 1.0)
DAMPING_OUT, DAMPING_IN = 0.1, 0.02
_TABLES = {"embedding"}
_RELAYS = {"view", "reshape", "contiguous", "clone", "_to_copy", "to"}


@dataclass(frozen=True)
class Site:
    """A consumer that may move: its matrix, its bias if it has one, and the columns that stay."""

    view: View
    offset: Offset | None
    keep: Tensor


@dataclass(frozen=True)
class Sample:
    """A batch and what the dense model gives for it; the latter is computed when it is needed."""

    batch: Args
    target: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Correction:
    """New weights by name, and D on the held-out samples at each rate that was tried."""

    weights: dict[str, Tensor]
    rate: float
    tried: tuple[tuple[float, float], ...]


@dataclass
class _Sums:
    cross: Tensor
    second: Tensor
    metric: Tensor


Read = Callable[[str], Tensor]


def correct(
    module: GraphModule,
    read: Read,
    sites: Sequence[Site],
    fit: Iterable[Sample],
    held: Sequence[Sample],
) -> Correction:
    """`read(name)`: the weight as pruned so far, dense-shaped, removed columns zero."""
    words = vocabularies(module)
    sums, distance, tokens = _gradients(module, read, sites, fit, words)
    if not sums or not tokens:
        return Correction({}, 0.0, ())
    steps = {site.view.node: _step(site, sums[site.view.node], tokens) for site in sites}
    slope = sum(float((sums[node].cross * step).sum()) for node, step in steps.items()) / tokens
    if not slope < 0:
        return Correction({}, 0.0, ())
    whole = -distance / tokens / slope
    targets = [sample.target() for sample in held]

    def at(rate: float) -> float:
        moved = _moved(read, sites, steps, rate)
        lost = 0.0
        for sample, target in zip(held, targets, strict=True):
            outputs = _outputs(module, sample.batch, lambda n: moved.get(n, read(n)))
            lost += float(apart(outputs, target, words))
        return lost

    tried = [(rate, at(rate)) for rate in (0.0, *(whole * share for share in SHARES))]
    rate = min((lost, rate) for rate, lost in tried)[1]
    return Correction(_moved(read, sites, steps, rate) if rate else {}, rate, tuple(tried))


def vocabularies(module: GraphModule) -> frozenset[int]:
    """Lengths of the tables that an input of the model indexes as it is."""
    found = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or op_name(node) not in _TABLES:
            continue
        bound = bind(node, node.args, node.kwargs)
        table, index = bound["weight"], bound["indices"]
        while isinstance(index, Node) and index.op == "call_function" and op_name(index) in _RELAYS:
            index = index.args[0]
        ours = isinstance(table, Node) and table.op == "get_attr"
        if ours and isinstance(index, Node) and index.op == "placeholder":
            found.add(int(attribute(module, str(table.target)).shape[0]))
    return frozenset(found)


def apart(outputs: list[Tensor], target: list[Tensor], words: frozenset[int]) -> Tensor:
    """D between two runs of one batch."""
    pairs = list(zip(outputs, target, strict=True))
    told = [(o, t) for o, t in pairs if o.dim() and o.shape[-1] in words]
    total = torch.zeros(())
    for output, wanted in told or pairs:
        o, t = output.float(), wanted.float()
        if told:
            log, dense = o.log_softmax(-1), t.log_softmax(-1)
            part = (dense.exp() * (dense - log)).sum()
        else:
            part = (o - t).square().sum() / (2 * t.square().mean()).clamp_min(1e-12)
        total = total.to(part.device) + part
    return total


def _gradients(
    module: GraphModule,
    read: Read,
    sites: Sequence[Site],
    fit: Iterable[Sample],
    words: frozenset[int],
) -> tuple[dict[Node, _Sums], float, int]:
    """G, S and A of every site that a gradient reaches; D; tokens of the site that sees most."""
    by_node = {site.view.node: site for site in sites}
    sums: dict[Node, _Sums] = {}
    distance, tokens = 0.0, 0
    for sample in fit:
        rows: dict[Node, Tensor] = {}
        probes: dict[Node, Tensor] = {}

        def watch(
            node: Node,
            value: Any,
            result: Tensor,
            rows: dict[Node, Tensor] = rows,
            probes: dict[Node, Tensor] = probes,
        ) -> Tensor:
            if node not in by_node:
                return result
            rows[node] = _rows(by_node[node], value, read)
            probes[node] = torch.zeros_like(result, requires_grad=True)
            return result + probes[node]

        with torch.enable_grad():
            (environment,) = environments(module, [sample.batch])
            outputs = run(module, environment, read, watch)
            loss = apart(outputs, sample.target(), words)
        if not loss.requires_grad:
            return {}, 0.0, 0
        for node, gradient in zip(probes, gradients(loss, list(probes.values())), strict=True):
            out = by_node[node].view.outputs(probes[node] if gradient is None else gradient)
            _add(sums, node, out.detach().float(), rows[node])
        distance += float(loss.detach())
        tokens += max(map(len, rows.values()))
    return sums, distance, tokens


def _rows(site: Site, value: Any, read: Read) -> Tensor:
    """The consumer's input [tokens, in], with a column of ones where it has a bias."""
    weight = read(site.view.parameter)
    rows = site.view.rows(value(site.view.source).detach(), weight).float()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if site.offset else rows


def _add(sums: dict[Node, _Sums], node: Node, out: Tensor, rows: Tensor) -> None:
    if node not in sums:
        sizes = ((out.shape[1], rows.shape[1]), (rows.shape[1],) * 2, (out.shape[1],) * 2)
        sums[node] = _Sums(*(rows.new_zeros(size) for size in sizes))
    s = sums[node]
    s.cross.addmm_(out.T, rows)
    s.second.addmm_(rows.T, rows)
    s.metric.addmm_(out.T, out)


def _step(site: Site, sums: _Sums, tokens: int) -> Tensor:
    """[out, in (+ 1)]; zero in removed columns."""
    keep = site.keep
    if site.offset:
        keep = torch.cat([keep, keep.new_ones(1)])
    second = _damped(sums.second[keep][:, keep].double() / tokens, DAMPING_IN)
    metric = _damped(sums.metric.double() / tokens, DAMPING_OUT)
    slope = sums.cross[:, keep].double() / tokens
    step = torch.zeros_like(sums.cross, dtype=torch.float64)
    step[:, keep] = -torch.linalg.solve(second, torch.linalg.solve(metric, slope).T).T
    return step


def _damped(matrix: Tensor, share: float) -> Tensor:
    floor = torch.finfo(torch.float64).tiny
    matrix.diagonal().add_((share * matrix.diagonal().mean()).clamp_min(floor))
    return matrix


def _moved(
    read: Read, sites: Sequence[Site], steps: Mapping[Node, Tensor], rate: float
) -> dict[str, Tensor]:
    """The weights and biases after the step; removed columns stay exactly zero."""
    found: dict[str, Tensor] = {}
    for site in sites:
        view, step = site.view, rate * steps[site.view.node]
        weight = read(view.parameter)
        matrix = view.matrix(weight)
        new = matrix.double() + step[:, : matrix.shape[1]]
        found[view.parameter] = view.weight(new.to(weight.dtype), weight)
        if site.offset:
            stored = read(site.offset.name)
            bias = site.offset.read(stored).double() + step[:, -1]
            found[site.offset.name] = site.offset.read(bias.to(stored.dtype))
    return found


@torch.no_grad()
def _outputs(module: GraphModule, batch: Args, read: Read) -> list[Tensor]:
    (environment,) = environments(module, [batch])
    return run(module, environment, read)
