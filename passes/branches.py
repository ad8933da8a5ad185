"""branches: a forward branches on the numbers in tensors, and one way serves for both.

    if hit.any(): out[hit] += expert(x[hit])      the work is done, on no rows as well
    if rows.numel() == 0: continue                nothing is skipped
    for k in counts.nonzero(): ...                every k
    if h.isnan().any(): h = repaired(h)           never seen: the graph asserts that it is not so

First the model runs on the example inputs, and on inputs that are alike in all rows, so that most
experts have nothing to do; what was decided where is noted (passes/watch.py). Then it is traced
with one way at each place where both were seen, and compared with the model on these runs and on
fresh ones; the report names the lines. Where one way was seen the graph asserts it. What tells more
of a number than whether there is any (rows.numel() < 2) is refused.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError
from .fakes import unknowns
from .tracing import CONSTANTS
from .visit import op_name
from .watch import Site, Watch, is_truth, named, selects, site_of_call

MANY = 1009  # rows of a selection of unknown size, where forward asks for their number
LOOPS = 64  # a truth is asked for so many times more often in a trace than in a run at most
_ALONG = {  # calls that may give a row for each row
    *(Tensor.squeeze, Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.unsqueeze),
    *(Tensor.__getitem__, Tensor.to, Tensor.cpu, Tensor.int, Tensor.long, Tensor.contiguous),
    *(torch.squeeze, torch.flatten, torch.reshape, torch.unsqueeze, Tensor.detach),
}
_VISITING = {Tensor.tolist, Tensor.unbind, torch.unbind}
_READING = {*_VISITING, Tensor.item, Tensor.__index__, Tensor.__int__, Tensor.__format__}
ASSUMED = "the graph holds for one way of a branch on numbers alone, that of"


class Assumed(TorchFunctionMode):
    """The way to trace at every place. `doing`: what is taken where both ways were seen; `runs`:
    those that were watched; `many`: the number of rows where forward asks for one.
    """

    def __init__(self, watch: Watch, doing: bool, runs: list[Any], many: int = MANY) -> None:
        super().__init__()
        self.watch, self.doing, self.runs, self.many = watch, doing, runs, many
        self.made: dict[Any, Site] = {}  # unbacked symbol -> where it came from
        self.beyond = False  # positions are visited that no run selected
        self.counted = False  # forward asked for a number of rows
        self.both: set[Site] = set()  # where one way serves for both
        self._asked: Counter[Site] = Counter()

    @property
    def lines(self) -> tuple[str, ...]:
        """Where one way serves for both, in words."""
        return tuple(sorted({named(site) for site in self.both}))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_truth(func, args) and (ways := self.watch.ways.get(site := site_of_call())):
            return self._way(args[0], ways, site)
        if func is Tensor.__len__ and self._may_be_many(unknowns(args[0].shape[0])):
            self.counted = True
            return self.many
        every, exact, chosen = getattr(args[0] if args else None, "_every", (None, False, ()))
        if every is not None and func in (_READING if exact else _VISITING):
            self._visit(chosen)
            with _disable_current_modes():
                read = func(every, *args[1:], **kwargs)
            return pytree.tree_map(lambda v: _constant(v, chosen), read)
        result = func(*args, **kwargs)
        self._note(result)
        if every is not None and func in _ALONG:
            with _disable_current_modes():
                along = func(every, *args[1:], **kwargs)
            if exact or (_keeps_rows(func, args) and along.shape[:1] == every.shape[:1]):
                _mark(result, along, exact, chosen)
        elif selects(func, args):
            self._selected(args[0], result, site_of_call())
        return result

    def _way(self, condition: Tensor, ways: set[bool], site: Site) -> bool:
        self._asked[site] += 1
        if self._asked[site] > LOOPS * self.watch.most[site]:
            raise CaptureError(
                f"a loop goes on for as long as numbers say at {named(site)} · help: give it a "
                "number of steps"
            )
        if len(ways) == 2:
            self.both.add(site)
            return self.doing
        (way,) = ways
        said = f"{ASSUMED} {named(site)}, where it was {way} in the example inputs"
        torch._assert_async((condition if way else ~condition.bool()).cpu(), said)
        return way

    def _visit(self, site: Site) -> None:
        if site not in self.watch.partly:
            raise CaptureError(
                f"every position was selected at {named(site)} · help: example inputs that select "
                "some"
            )
        self.beyond = True
        self.both.add(site)

    def _note(self, result: Any) -> None:
        for symbol in unknowns(result) - self.made.keys():
            self.made[symbol] = site_of_call()

    def _selected(self, source: Tensor, result: Any, site: Site) -> None:
        """Beside the positions that are selected, all that might be."""
        shape = tuple(source.shape)
        found = result if isinstance(result, Tensor) else result[0]
        if found.dtype != torch.int64 or len(shape) != 1 or not isinstance(shape[0], int):
            return
        if shape[0] <= CONSTANTS:
            with _disable_current_modes():
                every = torch.arange(shape[0])
                every = every.unsqueeze(1) if isinstance(result, Tensor) else every
            _mark(found, every, False, site)

    def _may_be_many(self, symbols: set[Any]) -> bool:
        """Whether one size was seen to be none and to be more, or will be."""
        sites = [self.made.get(symbol, ()) for symbol in symbols]
        if len(sites) != 1 or not (self.beyond or self.watch.rows.get(sites[0]) == {True, False}):
            return False
        self.both.update(sites)
        return True

    @contextlib.contextmanager
    def assuming(self) -> Iterator[None]:
        """The context in which a branch on whether there are rows finds some, and forward does what
        it does outside of a trace.
        """
        from torch.fx.experimental import sym_node, symbolic_shapes

        decide, compiling = sym_node.SymNode.guard_bool, torch.compiler.is_compiling

        def guard_bool(node: Any, file: str, line: int) -> bool:
            try:
                return decide(node, file, line)
            except symbolic_shapes.GuardOnDataDependentSymNode:
                symbols = symbolic_shapes.free_unbacked_symbols(node.expr)
                found = {
                    bool(node.expr.xreplace(dict.fromkeys(symbols, n))) for n in (1, 2, 3, MANY)
                }
                if len(found) > 1 or not self._may_be_many(symbols):
                    raise
                return found.pop()

        sym_node.SymNode.guard_bool = guard_bool
        torch.compiler.is_compiling = lambda: False
        try:
            with self:
                yield
        finally:
            sym_node.SymNode.guard_bool, torch.compiler.is_compiling = decide, compiling

    def __call__(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward`, traced in these ways."""

        def decided(*args: Any, **kwargs: Any) -> Any:
            with self.assuming():
                return forward(*args, **kwargs)

        return decided


def _mark(result: Any, every: Any, exact: bool, site: Site) -> None:
    """Note the positions that `result` holds, or at most holds; and where they were selected."""
    if isinstance(result, Tensor) and isinstance(every, Tensor) and result.dim() == every.dim():
        result._every = (every, exact, site)  # type: ignore[attr-defined]


def _constant(held: Any, site: Site) -> Any:
    if not isinstance(held, Tensor):
        return held
    made = torch.tensor(held.tolist(), dtype=held.dtype).reshape(held.shape)
    _mark(made, held, True, site)
    return made


def _keeps_rows(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the first dim stays whole."""
    if func is not Tensor.__getitem__:
        return True
    return isinstance(args[1], tuple) and args[1][:1] == (slice(None),)


def is_own(node: Node) -> bool:
    """Whether a node asserts that the way which was captured is taken."""
    return op_name(node) == "_assert_async" and str(node.args[-1]).startswith(ASSUMED)


def assumptions(module: GraphModule) -> list[str]:
    """What the graph asserts of the ways that forward takes."""
    return list(dict.fromkeys(str(n.args[-1]) for n in module.graph.nodes if is_own(n)))
