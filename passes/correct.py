"""correct: a few damped Newton steps of all layers at once, seen from the model's outputs.

The walk repairs consumer by consumer. What is left is a distance of the whole pruned model f_W from
the dense one f over tokens t,

    D(W) = sum_t d(f(t), f_W(t))

    d = KL(softmax f || softmax f_W)    for outputs as wide as the vocabulary that the inputs index
    d = ||f - f_W||^2 / (2 mean f^2)    for any other outputs

At a linear layer or convolution y = W x, consumer or producer, with x and g = dD/dy per token, kept
columns K:

    M <- sum g x^T + M / 2  [out, in]     over the N tokens of this step, M of the steps before
    S = mean x x^T, a = mean g^2 [out]    over the tokens of all steps so far
    step_K = -diag(a + a0)^-1 (M_:K / N) (S_KK + s0 I)^-1,    a0, s0 relative to the mean diagonal

which is Newton's step where the Hessian is diag(a) (x) S, with momentum (K-FAC, arXiv 1503.05671;
a from the gradients themselves). It ignores that all layers repay the same error, so it is taken
only in part: W += rate * step. The rates tried are shares of the one at which the slope alone would
bring D to zero, and the one of least D on held-out rows is taken; none, if none lowers D there. A
bias is one more column of ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from .capture import Args
from .consumers import Offset
from .observe import backward, environments, tap
from .rewrite import attribute
from .room import Room
from .sensitivity import run
from .views import View
from .visit import bind, op_name

SHARES = (0.5, 1.0)
ELEMENTS = 2**24  # of logits, in one part of D
DAMPING_OUT, DAMPING_IN, MOMENTUM = 0.1, 0.02, 0.5
_TABLES = {"embedding"}
_RELAYS = {"view", "reshape", "contiguous", "clone", "_to_copy", "to"}


@dataclass(frozen=True)
class Site:
    """A layer that may move: its matrix, its bias if it has one, and the columns that stay."""

    view: View
    offset: Offset | None
    keep: Tensor

    @property
    def entry(self) -> tuple[Any, ...]:
        """What enters it: sites with the same entry see the same rows."""
        view = self.view
        alone = view.node if view.convolution else None
        return (view.source, view.source_dim, self.offset is not None, alone)


@dataclass(frozen=True)
class Sample:
    """A batch and what the dense model gives for it; the latter is computed when it is needed."""

    batch: Args
    target: Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Correction:
    """New weights by name, and of every step D on the held-out samples at each rate tried."""

    weights: dict[str, Tensor]
    steps: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def distances(self) -> tuple[float, ...]:
        """D on the held-out samples before the first step and after each, as shares of the first;
        empty where no step could be tried.
        """
        if not self.steps:
            return ()
        found = [self.steps[0][0][1], *(min(d for _, d in tried) for tried in self.steps)]
        return tuple(distance / max(found[0], 1e-300) for distance in found)


@dataclass
class _Sums:
    """`cross`, `power`: M and the sum of g^2 by node; `second`: the sum of x x^T by entry.
    `distance`: D of this step; `tokens`, `seen`: tokens of this step, and of all steps so far, at
    the layer that sees most.
    """

    cross: dict[Node, Tensor] = field(default_factory=dict)
    power: dict[Node, Tensor] = field(default_factory=dict)
    second: dict[Any, Tensor] = field(default_factory=dict)
    distance: float = 0.0
    tokens: int = 0
    seen: int = 0


Read = Callable[[str], Tensor]


def correct(
    module: GraphModule,
    read: Read,
    sites: Sequence[Site],
    fits: Sequence[Sequence[Sample]],
    held: Sequence[Sample],
    room: Room | None = None,
) -> Correction:
    """One step for each of `fits`. `read(name)`: the weight as pruned so far, dense-shaped, removed
    columns zero. `room`: of several processes, each with its share of the samples, or none.
    """
    room = room or Room()
    words, sums, moved = vocabularies(module), _nothing(sites, read), dict[str, Tensor]()
    targets = [sample.target() for sample in held]

    def now(name: str) -> Tensor:
        return moved[name] if name in moved else read(name)

    def lost(at: Read) -> float:
        pairs = zip(held, targets, strict=True)
        own = sum(apart(_outputs(module, s.batch, at), t, words)[0] for s, t in pairs)
        (distance,) = room.sums(own)
        return distance

    least, steps = lost(now), []
    for fit in fits:
        if not _gradients(module, now, sites, fit, words, sums, room):
            break
        step = _steps(sites, sums)
        slope = sum(float((sums.cross[node] * step[node]).sum()) for node in step) / sums.tokens
        if not slope < 0:
            break
        rates = [share * -sums.distance / sums.tokens / slope for share in SHARES]
        tried = [(0.0, least), *((r, lost(_at(now, sites, step, r))) for r in rates)]
        least, rate = min((distance, rate) for rate, distance in tried)
        steps.append(tuple(tried))
        if rate:
            ahead = _at(now, sites, step, rate)
            moved |= {name: ahead(name) for site in sites for name in _names(site)}
    return Correction(moved, tuple(steps))


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


@torch.no_grad()
def apart(
    outputs: list[Tensor], target: list[Tensor], words: frozenset[int]
) -> tuple[float, list[Tensor]]:
    """D between two runs of one batch, and its slope at each output that has a gradient."""
    told = [output.dim() > 0 and output.shape[-1] in words for output in outputs]
    parts: list[Tensor] = []
    slopes = []
    for o, t, over_words in zip(outputs, target, told, strict=True):
        slope = o.new_zeros(o.shape) if o.requires_grad else None
        if over_words:
            parts += _divergence(o, t, slope)
        elif not any(told):
            gap, mean = o.float() - t.float(), t.float().square().mean().clamp_min(5e-13)
            parts.append(gap.square().sum() / (2 * mean))
            if slope is not None:
                slope.copy_(gap / mean)
        slopes += [] if slope is None else [slope]
    return sum(map(float, parts)), slopes


def _divergence(output: Tensor, target: Tensor, slope: Tensor | None) -> Iterator[Tensor]:
    """KL(softmax target || softmax output) part by part, which keeps what is made on the way
    small; the slope is written.
    """
    size = output.shape[-1]
    held = [tensor for tensor in (output, target, slope) if tensor is not None]
    parts = (tensor.reshape(-1, size).split(max(ELEMENTS // size, 1)) for tensor in held)
    for o, t, *into in zip(*parts, strict=True):
        log, dense = o.float().log_softmax(-1), t.float().log_softmax(-1)
        yield (dense.exp() * (dense - log)).sum()
        for place in into:
            place.copy_(log.exp() - dense.exp())


def _nothing(sites: Sequence[Site], read: Read) -> _Sums:
    """The sums before the first step."""
    sums = _Sums()
    for site in sites:
        matrix = site.view.matrix(read(site.view.parameter))
        out, width = len(matrix), matrix.shape[1] + bool(site.offset)
        zeros = functools.partial(matrix.new_zeros, dtype=torch.float32)
        sums.cross[site.view.node] = zeros(out, width)
        sums.power[site.view.node] = zeros(out)
        if site.entry not in sums.second:
            sums.second[site.entry] = zeros(width, width)
    return sums


def _gradients(
    module: GraphModule,
    read: Read,
    sites: Sequence[Site],
    fit: Sequence[Sample],
    words: frozenset[int],
    sums: _Sums,
    room: Room,
) -> bool:
    """Add the samples of all processes to the sums; whether a gradient reaches a site."""
    by_node = {site.view.node: site for site in sites}
    tables = (sums.cross, sums.power, sums.second)
    sums.distance, sums.tokens = 0.0, 0
    for cross in sums.cross.values():
        cross *= MOMENTUM
    for held in (tensor for table in tables for tensor in table.values()):
        held /= room.size  # each process holds its part of what the sums were
    with room.agreed():
        for sample in fit:
            _add_sample(module, read, by_node, sample, words, sums)
    for table in tables:
        table.update({key: room.total(held) for key, held in table.items()})
    sums.distance, tokens = room.sums(sums.distance, sums.tokens)
    sums.tokens = int(tokens)
    sums.seen += sums.tokens
    return sums.tokens > 0


def _add_sample(
    module: GraphModule,
    read: Read,
    by_node: Mapping[Node, Site],
    sample: Sample,
    words: frozenset[int],
    sums: _Sums,
) -> None:
    leaves: list[Tensor] = []
    counts = {}

    def watch(node: Node, value: Any, result: Tensor) -> Tensor:
        site = by_node.get(node)
        if site is None:
            return result
        weight, entering = read(site.view.parameter), value(site.view.source).detach()
        if site.entry not in counts:
            rows = _rows(site, entering, weight)
            sums.second[site.entry].addmm_(rows.T, rows)
            counts[site.entry] = len(rows)

        def see(gradient: Tensor) -> None:
            slope = site.view.outputs(gradient).float()
            sums.cross[node].addmm_(slope.T, _rows(site, entering, weight))
            sums.power[node] += slope.square().sum(0)

        return tap(result, leaves, see)

    with torch.enable_grad():
        (environment,) = environments(module, [sample.batch])
        outputs = run(module, environment, read, watch)
        distance, slopes = apart(outputs, sample.target(), words)
        if not slopes:  # no gradient reaches a site
            return
        backward([output for output in outputs if output.requires_grad], slopes, leaves)
    sums.distance += distance
    sums.tokens += max(counts.values())


def _rows(site: Site, entering: Tensor, weight: Tensor) -> Tensor:
    """The layer's input [tokens, in], with a column of ones where it has a bias."""
    rows = site.view.rows(entering, weight).float()
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if site.offset else rows


def _steps(sites: Sequence[Site], sums: _Sums) -> dict[Node, Tensor]:
    """[out, in (+ 1)] of every site; zero in removed columns. Empty where numbers overflow."""
    found: dict[Node, Tensor] = {}
    factors: dict[Any, Tensor] = {}
    for site in sites:
        node, keep = site.view.node, site.keep
        if site.offset:
            keep = torch.cat([keep, keep.new_ones(1)])
        key = (site.entry, tuple(keep.tolist()))
        if key not in factors:
            second = sums.second[site.entry][keep][:, keep].double() / sums.seen
            second.diagonal().add_(_damping(second.diagonal(), DAMPING_IN))
            factors[key], failed = torch.linalg.cholesky_ex(second)
            if int(failed):
                return {}
        power = sums.power[node].double() / sums.seen
        power += _damping(power, DAMPING_OUT)
        slope = sums.cross[node][:, keep].double() / sums.tokens
        found[node] = torch.zeros_like(sums.cross[node])
        solved = torch.cholesky_solve(slope.T / power, factors[key]).T
        found[node][:, keep] = -solved.to(found[node].dtype)
    return found


def _damping(diagonal: Tensor, share: float) -> Tensor:
    return (share * diagonal.mean()).clamp_min(torch.finfo(torch.float64).tiny)


def _names(site: Site) -> list[str]:
    return [site.view.parameter, *([site.offset.name] if site.offset else [])]


def _at(read: Read, sites: Sequence[Site], steps: Mapping[Node, Tensor], rate: float) -> Read:
    """Reads the weights and biases after the step; removed columns stay exactly zero."""
    by_name = {name: site for site in sites for name in _names(site)}

    def moved(name: str) -> Tensor:
        stored, site = read(name), by_name.get(name)
        if site is None:
            return stored
        step = rate * steps[site.view.node].double()
        if site.offset and name == site.offset.name:
            bias = site.offset.read(stored).double() + step[:, -1]
            return site.offset.read(bias.to(stored.dtype))
        matrix = site.view.matrix(stored)
        new = matrix.double() + step[:, : matrix.shape[1]]
        return site.view.weight(new.to(stored.dtype), stored)

    return moved


def dense_outputs(module: GraphModule, batch: Args) -> list[Tensor]:
    """What the dense model gives for a batch."""
    return _outputs(module, batch, lambda name: attribute(module, name))


@torch.no_grad()
def _outputs(module: GraphModule, batch: Args, read: Read) -> list[Tensor]:
    (environment,) = environments(module, [batch])
    return run(module, environment, read)
