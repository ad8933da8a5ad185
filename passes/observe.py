"""observe: one walk over the graph, all calibration batches side by side at a frontier.

Nodes run in order. Before a node that the caller wants to see, `visit` is called with the walk; it
reads the node's inputs over all batches and may replace weights, which every later node then uses.
From one such stop to the next the batches run one after the other, and a value is dropped after its
last use: the walk costs one forward pass, and of all batches it holds only what is live at a stop.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from .capture import Args
from .errors import CalibrationError, NoGradient, brief, where
from .functional import written
from .kernels import told_causal
from .lazy import Lazy, materialized
from .placement import Places, home, moved, spread
from .room import Room
from .views import Seen, View

BLOCKS = 16  # of a Gram matrix's diagonal
MIN_BLOCK = 64  # narrower products waste the machine


@dataclass(frozen=True)
class Moments:
    """Sums over tokens at a consumer's input: gram = X^T X [in, in], mean of X [in], number
    of tokens.
    """

    gram: Tensor
    mean: Tensor
    tokens: int

    def tell(self, columns: Tensor) -> bool:
        """Whether they tell the worth of columns (bool [in]): some were other than zero."""
        return bool(self.gram.diagonal()[columns.to(self.gram.device)].any())

    def __add__(self, other: Moments) -> Moments:
        """Of the tokens of both."""
        tokens = self.tokens + other.tokens
        total = self.mean * self.tokens + other.mean * other.tokens
        return Moments(self.gram + other.gram, total / max(tokens, 1), tokens)

    def to(self, place: torch.device) -> Moments:
        """The same on a device."""
        return Moments(self.gram.to(place), self.mean.to(place), self.tokens)


def fold(rows: Tensor, seen: int, part: int | None) -> Tensor:
    """All rows (None), those to fit to (0), or those held out (1): a quarter of all rows so far,
    `seen` before these, and the last of a batch.
    """
    cut = len(rows) + seen // 4 - (seen + len(rows)) // 4
    return rows if part is None else (rows[:cut], rows[cut:])[part]


@dataclass
class Walk:
    """The state of a walk: live values per batch, and weights that replace the module's. `places`:
    where nodes run, if not where the model is; `here`: of these the one that the walk is at. A
    buffer that the graph writes into is a value: each batch has its own.
    """

    module: GraphModule
    environments: list[dict[Node, Any]]
    weights: dict[str, Tensor] = field(default_factory=dict)
    room: Room = field(default_factory=Room)
    places: Places = field(default_factory=dict)
    here: torch.device | None = None

    def held(self, name: str) -> Tensor:
        """The current weight of a parameter or buffer; its numbers may be a promise."""
        return (
            self.weights[name] if name in self.weights else operator.attrgetter(name)(self.module)
        )

    def weight(self, name: str) -> Tensor:
        """The numbers of the current weight: read here, gone with the last reference."""
        return moved(materialized(self.held(name)), self.here)  # type: ignore[no-any-return]

    def value(self, environment: dict[Node, Any], node: Node) -> Any:
        """A node's value in one batch, where the walk is."""
        if node.op == "get_attr" and node not in environment:
            return self.weight(str(node.target))
        return moved(environment[node], self.here)

    def moments(self, view: View, part: int | None = None) -> Moments:
        """Sums over all batches at a consumer, or over a part of each (`fold`); CalibrationError if
        an activation is not finite.
        """
        weight = self.held(view.parameter)  # for its shape
        values = [environment.get(view.source) for environment in self.environments]
        held = [self.value({}, view.source) if v is None else v for v in values]
        shapes = [view.rows(value.to("meta"), weight).shape for value in held]
        before = self.room.ahead(torch.tensor([rows for rows, _ in shapes])).tolist()
        width = shapes[0][1]
        place = self.here or held[0].device
        zeros = functools.partial(torch.zeros, dtype=torch.float32, device=place)
        gram, total, tokens = zeros(width, width), zeros(width), 0
        for value, seen in zip(held, before, strict=True):
            rows = summable(fold(view.rows(moved(value, self.here), weight), seen, part))
            add_gram(gram, rows)
            total += rows.sum(0, dtype=torch.float32)
            tokens += len(rows)
        mirror(gram)
        gram, total = self.room.total(gram), self.room.total(total)
        tokens = int(self.room.sums(tokens)[0])
        check_finite(view, gram)
        return Moments(gram, total / max(tokens, 1), tokens)

    def run(
        self,
        nodes: Sequence[Node],
        over: Mapping[Node, Iterable[Node]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run nodes that follow each other on all batches. `over`: what goes after each node
        (`last_reads`); `progress`: told how many of the nodes are done.
        """
        start, gone = 0, over or {}
        for part in self._parts(nodes):
            self.here = self.places.get(part[0])
            read = self._read(part)
            for number, environment in enumerate(self.environments):
                for node in part:
                    self._step(node, environment, read)
                    for value in gone.get(node, ()):
                        environment.pop(value, None)
                if self.room.settle:
                    self.room.settle(self.environments, environment)
                if progress:
                    progress(start + len(part) * (number + 1) // len(self.environments))
            read.clear()  # before the next part's are read
            start += len(part)

    def _read(self, part: Sequence[Node]) -> dict[Node, Any]:
        """The weights that nodes read, but what is a value of each batch."""
        inputs = {arg: None for node in part for arg in node.all_input_nodes}
        own = self.environments[0] if self.environments else {}
        wanted = [arg for arg in inputs if arg.op == "get_attr" and arg not in own]
        return {arg: self.weight(str(arg.target)) for arg in wanted}

    def _parts(self, nodes: Sequence[Node]) -> Iterator[list[Node]]:
        """The nodes, such that those of a part run in one place, and that at most the last of them
        reads weights that are promised or elsewhere: these are held while all batches go through.
        """
        part: list[Node] = []
        for node in nodes:
            if part and self.places.get(node) != self.places.get(part[0]):
                yield part
                part = []
            part.append(node)
            if any(arg.op == "get_attr" and self._far(arg) for arg in node.all_input_nodes):
                yield part
                part = []
        if part:
            yield part

    def go_home(self) -> None:
        """Weights that were replaced here, back to where the model is."""
        if not self.places:
            return
        for name, held in list(self.weights.items()):
            if held.device == self.here and not isinstance(held, Lazy):
                self.weights[name] = held.to(home(self.module, name))

    def _far(self, weight: Node) -> bool:
        held: Any = self.held(str(weight.target))
        return isinstance(held, Lazy) or bool(self.places)

    def _step(self, node: Node, environment: dict[Node, Any], read: Mapping[Node, Any]) -> None:
        for arg in node.all_input_nodes if self.here is not None else ():
            if arg not in read:
                environment[arg] = moved(environment[arg], self.here)
        args, kwargs = pytree.tree_map(
            lambda a: a if not isinstance(a, Node) else read[a] if a in read else environment[a],
            (node.args, node.kwargs),
            is_leaf=lambda a: isinstance(a, Node),
        )
        if self.here is not None and kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": self.here}
        environment[node] = moved(called(node, args, kwargs), self.here)


def check_finite(view: Seen, *sums: Tensor) -> None:
    """CalibrationError if a consumer saw numbers that are not finite."""
    if not all(bool(torch.isfinite(held).all()) for held in sums):
        raise CalibrationError(
            f"non-finite activations reach {view.parameter} · {where(view.node)} · help: check the "
            "model in this precision and the calibration data"
        )


def called(node: Node, args: Any, kwargs: Any) -> Any:
    """The node's result on calibration data; CalibrationError where the data do not fit it."""
    args, kwargs = told_causal(node, args, kwargs)
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, IndexError) as error:
        _refuse_gradient(node, args, kwargs, error)
        raise CalibrationError(
            f"a calibration batch does not run: {brief(error, 300)} · "
            f"{where(node)} · help: give batches of the same form as `inputs`"
        ) from error


def _refuse_gradient(node: Node, args: Any, kwargs: Any, error: Exception) -> None:
    """NoGradient if the node runs where no gradient is asked for."""
    if torch.is_grad_enabled():
        with torch.no_grad(), suppress(RuntimeError, TypeError, IndexError):
            node.target(*args, **kwargs)  # type: ignore[operator]
            raise no_gradient(f"{error} · {where(node)}") from error


def no_gradient(why: str) -> NoGradient:
    """The error for an op without a derivative."""
    return NoGradient(
        f"an op has no derivative: {brief(why, 400)} · help: give it one "
        "(torch.library.register_autograd), or take restore=affine and allocation=curves"
    )


def tap(result: Tensor, leaves: list[Tensor], see: Callable[[Tensor], None]) -> Tensor:
    """`result` to go on with, such that `backward` from `leaves` gives its gradient to `see`."""
    leaf = result.new_zeros((), requires_grad=True)
    leaves.append(leaf)
    result = result + leaf
    result.register_hook(see)
    return result


def backward(outputs: Sequence[Tensor], slopes: Sequence[Tensor], leaves: list[Tensor]) -> None:
    """One backward pass from the slopes of the outputs; what is tapped sees its gradient, unless
    none reaches it. NoGradient names an op that has none.
    """
    try:
        torch.autograd.grad(outputs, leaves, slopes, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise no_gradient(str(error)) from error


def summable(rows: Tensor) -> Tensor:
    """Rows as `add_gram` takes them: float32; on a GPU half precision stays, since its products
    are exact in the float32 that they are summed in.
    """
    exact = rows.is_cuda and rows.dtype in (torch.float16, torch.bfloat16)
    return rows if exact else rows.to(torch.float32)


def add_gram(gram: Tensor, rows: Tensor, block: int | None = None) -> None:
    """Add X^T X, up to blocks of the diagonal what lies below it alone: (1 + 1/BLOCKS) / 2 of the
    work of the whole product.
    """
    block = block or _block(gram)
    left, right = rows.T, rows
    if len(gram) > block:
        half = len(gram) // 2
        add_gram(gram[:half, :half], rows[:, :half], block)
        add_gram(gram[half:, half:], rows[:, half:], block)
        gram, left, right = gram[half:, :half], left[half:], rows[:, :half]
    if rows.dtype == gram.dtype:
        gram.addmm_(left, right)
    else:
        gram.copy_(torch.addmm(gram, left, right, out_dtype=gram.dtype))


def mirror(gram: Tensor, block: int | None = None) -> None:
    """Copy what `add_gram` has left below the diagonal above it, in place."""
    block = block or _block(gram)
    if len(gram) > block:
        half = len(gram) // 2
        mirror(gram[:half, :half], block)
        mirror(gram[half:, half:], block)
        gram[:half, half:] = gram[half:, :half].T


def _block(gram: Tensor) -> int:
    return max(MIN_BLOCK, -(-len(gram) // BLOCKS))


def environments(module: GraphModule, batches: Iterable[Args]) -> Iterator[dict[Node, Any]]:
    """Placeholders bound to each batch."""
    places = [node for node in module.graph.nodes if node.op == "placeholder"]
    for args in batches:
        leaves = pytree.tree_leaves(args)
        if len(leaves) != len(places):
            raise CalibrationError(
                f"a calibration batch has {len(leaves)} values, the model was captured with "
                f"{len(places)} · "
                "help: give batches of the same form as `inputs`"
            )
        yield dict(zip(places, leaves, strict=True))


def last_reads(
    module: GraphModule, again: Mapping[Node, Sequence[Node]] | None = None
) -> dict[Node, list[Node]]:
    """Node -> the values that nothing reads after it. `again`: as `walk` has it."""
    place = {node: number for number, node in enumerate(module.graph.nodes)}
    last = {arg: node for node in place for arg in node.all_input_nodes}
    for stop, several in (again or {}).items():
        for arg in {arg: None for node in several for arg in node.all_input_nodes}:
            last[arg] = max(last[arg], stop, key=place.__getitem__)
    over: dict[Node, list[Node]] = {}
    for value, node in last.items():
        over.setdefault(node, []).append(value)
    return over


def begun(
    module: GraphModule,
    batches: Iterable[Args],
    room: Room | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> Walk:
    """A walk before the first node."""
    room, tables = room or Room(), written(module.graph)
    places = spread(module, room.devices)
    state = Walk(module, list(environments(module, batches)), dict(weights or {}), room, places)
    for node in module.graph.nodes:
        for environment in state.environments if str(node.target) in tables else ():
            environment[node] = state.held(str(node.target)).clone()
    return state


def forked(environment: Mapping[Node, Any]) -> dict[Node, Any]:
    """The values of a batch for another run: what this writes into is its own."""
    return {n: v.clone() if n.op == "get_attr" else v for n, v in environment.items()}


@torch.no_grad()
def walk(
    module: GraphModule,
    batches: Iterable[Args],
    stops: Iterable[Node],
    visit: Callable[[Walk, Node], None],
    progress: Callable[[int, int], None] | None = None,
    room: Room | None = None,
    again: Mapping[Node, Sequence[Node]] | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run until the last stop, `weights` replaced from the start; returns the replaced weights by
    name. `again`: a stop -> nodes before it that depend on a weight which the visit replaces, and
    so are run once more.
    """
    wanted = set(stops)
    state = begun(module, batches, room, weights)
    if wanted and not state.environments:
        raise CalibrationError("calibration is empty · help: give at least one batch of inputs")
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    repeated = again or {}
    over, done = last_reads(module, repeated), 0

    def report(more: int) -> None:
        if progress:
            progress(done + more, len(nodes))

    places = [place for place, node in enumerate(nodes) if node in wanted]
    for stop in places:
        state.run(nodes[done:stop], over, report)
        state.here = state.places.get(nodes[stop])
        visit(state, nodes[stop])
        state.go_home()
        state.run(repeated.get(nodes[stop], ()))
        done = stop
    if places:
        report(1)
    return state.weights


@torch.no_grad()
def probe(state: Walk, start: Node, views: list[View]) -> dict[str, Moments]:
    """Moments at several consumers from `start` on, without changing the walk: consumer node
    name -> moments.
    """
    values = [forked(environment) for environment in state.environments]
    ahead = replace(state, environments=values, room=state.room.unbounded)
    wanted = {view.node: view for view in views}
    nodes = [node for node in state.module.graph.nodes if node.op == "call_function"]
    over, found = last_reads(state.module), dict[str, Moments]()
    done = nodes.index(start)
    for stop in (place for place, node in enumerate(nodes) if node in wanted):
        ahead.run(nodes[done:stop], over)
        ahead.here = state.here
        found[nodes[stop].name] = ahead.moments(wanted[nodes[stop]])
        done = stop
    return found
