"""branches: forward branches on the numbers in tensors, and one way serves for both.

    if hit.any(): out[hit] += expert(x[hit])      the work is done, on no rows as well
    if rows.numel() == 0: continue                nothing is skipped
    for k in counts.nonzero(): ...                every k
    if h.isnan().any(): h = repaired(h)           never seen: the graph asserts that it is not so

First the model runs on the example inputs, and on inputs that are alike in all rows, so that most
experts have nothing to do; what was decided where is noted. Then it is traced with one way at each
place. A way other than the one that was taken must change no number: all these runs are compared.
Where only one way was seen the graph asserts it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import SymBool, SymInt, Tensor
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError
from .tracing import CONSTANTS, real_or_complex
from .visit import op_name

Site = tuple[str, int]  # file and line of the user's code
MANY = 1009  # rows of a selection of unknown size, where a branch asks for their number
_SELECTING = (torch.nonzero, Tensor.nonzero, torch.where, torch.Tensor.argwhere, torch.argwhere)
_ALONG = {  # calls that give as many rows as they get
    *(Tensor.squeeze, Tensor.flatten, Tensor.reshape, Tensor.view, Tensor.unsqueeze),
    *(Tensor.__getitem__, Tensor.to, Tensor.cpu, Tensor.int, Tensor.long, Tensor.contiguous),
    *(torch.squeeze, torch.flatten, torch.reshape, torch.unsqueeze, Tensor.detach),
}
_READING = {
    *(Tensor.tolist, Tensor.unbind, torch.unbind),
    *(Tensor.item, Tensor.__index__, Tensor.__int__, Tensor.__format__),
}
ASSUMED = "the graph holds for one way of a branch on numbers alone, that of"
_OUTSIDE = (*(str(Path(held).parent) for held in (torch.__file__, __file__)), "<eval", "<frozen")


def _site() -> Site:
    """The nearest line outside torch and this package."""
    frame = sys._getframe(2)
    while frame.f_back and frame.f_code.co_filename.startswith(_OUTSIDE):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class Watch(TorchFunctionMode):
    """What is decided at every line while a model runs: `ways` holds the truth of tensors, `rows`
    whether anything was selected, `partly` lines that selected some of all positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ways: dict[Site, set[bool]] = defaultdict(set)
        self.rows: dict[Site, set[bool]] = defaultdict(set)
        self.partly: set[Site] = set()

    @property
    def undecided(self) -> bool:
        """Whether a tensor was seen to be true and to be false at one place."""
        return any(len(ways) == 2 for ways in self.ways.values())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        site = _site()
        if _is_truth(func, args):
            self.ways[site].add(result)
        for leaf in pytree.tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.rows[site].add(leaf.numel() > 0)
            elif type(leaf) is int:
                self.rows[site].add(leaf > 0)
        if _selects(func, args, kwargs):
            found = result if isinstance(result, Tensor) else result[0]
            if len(found) < args[0].numel():
                self.partly.add(site)
        return result


class Assumed(TorchFunctionMode):
    """The way to trace at every place; `doing`: what is taken where both ways were seen."""

    def __init__(self, watch: Watch, doing: bool, runs: list[Any]) -> None:
        super().__init__()
        self.watch, self.doing, self.runs = watch, doing, runs
        self.made: dict[Any, Site] = {}  # unbacked symbol -> where it came from
        self.beyond = False  # positions are visited that no run selected

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        site = _site()
        if _is_truth(func, args) and (ways := self.watch.ways.get(site)):
            return self._way(args[0], ways, site)
        every = getattr(args[0], "_every", None) if args else None
        if every is not None and func in _READING:
            if args[0]._chosen not in self.watch.partly:
                raise CaptureError(
                    f"every position was selected at {_named(args[0]._chosen)} · help: example "
                    "inputs that select some"
                )
            self.beyond = True
            with _disable_current_modes():
                read = func(every, *args[1:], **kwargs)
            return pytree.tree_map(lambda v: self._constant(v, args[0]._chosen), read)
        unknown = func is Tensor.__len__ and unknowns(args[0].shape[0])
        if unknown and self._may_be_many(unknown):
            return MANY
        result = func(*args, **kwargs)
        self._note(result, site)
        if every is not None and func in _ALONG:
            with _disable_current_modes():
                self._mark(result, func(every, *args[1:], **kwargs), args[0]._chosen)
        elif _selects(func, args, kwargs):
            self._selected(args[0], result, site)
        return result

    def _way(self, condition: Tensor, ways: set[bool], site: Site) -> bool:
        if len(ways) == 2:
            return self.doing
        (way,) = ways
        said = f"{ASSUMED} {_named(site)}, where it was {way} in the example inputs"
        torch._assert_async(condition if way else ~condition.bool(), said)
        return way

    def _note(self, result: Any, site: Site) -> None:
        for leaf in pytree.tree_leaves(result):
            sizes = leaf.shape if isinstance(leaf, Tensor) else (leaf,)
            for size in sizes:
                for symbol in unknowns(size):
                    self.made.setdefault(symbol, site)

    def _selected(self, source: Tensor, result: Any, site: Site) -> None:
        """Beside the positions that are selected, all that might be."""
        shape = tuple(source.shape)
        if len(shape) != 1 or not isinstance(shape[0], int) or shape[0] > CONSTANTS:
            return
        with _disable_current_modes():
            positions = torch.arange(shape[0])
            rows = positions.unsqueeze(1)
        if isinstance(result, Tensor):
            self._mark(result, rows, site)
        else:
            self._mark(result[0], positions, site)

    def _constant(self, held: Any, site: Site) -> Any:
        if not isinstance(held, Tensor):
            return held
        made = torch.tensor(held.tolist(), dtype=held.dtype).reshape(held.shape)
        self._mark(made, held, site)
        return made

    def _mark(self, result: Any, every: Any, site: Site) -> None:
        if isinstance(result, Tensor) and isinstance(every, Tensor) and result.dim() == every.dim():
            result._every, result._chosen = every, site  # type: ignore[attr-defined]

    def _may_be_many(self, symbols: set[Any]) -> bool:
        """Whether the sizes were seen to be none and to be more, or will be."""
        sites = [self.made.get(symbol, ("", 0)) for symbol in symbols]
        return self.beyond or all(self.watch.rows.get(site) == {True, False} for site in sites)

    @contextlib.contextmanager
    def assuming(self) -> Iterator[None]:
        """The context in which a branch on an unknown size takes it for MANY, and forward does what
        it does outside of a trace.
        """
        from torch.fx.experimental import sym_node, symbolic_shapes

        decide, compiling = sym_node.SymNode.guard_bool, torch.compiler.is_compiling

        def guard_bool(node: Any, file: str, line: int) -> bool:
            try:
                return decide(node, file, line)
            except symbolic_shapes.GuardOnDataDependentSymNode:
                symbols = symbolic_shapes.free_unbacked_symbols(node.expr)
                if not self._may_be_many(symbols):
                    raise
                return bool(node.expr.xreplace(dict.fromkeys(symbols, MANY)))

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


def _is_truth(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call asks if a tensor is true."""
    return func is Tensor.__bool__ or (func is Tensor.item and args[0].dtype == torch.bool)


def _selects(func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
    """Whether a call gives the positions where its one argument is true."""
    return func in _SELECTING and len(args) == 1 and not (kwargs or {}).keys() - {"as_tuple"}


def is_own(node: Node) -> bool:
    """Whether a node asserts that the way which was captured is taken."""
    return op_name(node) == "_assert_async" and str(node.args[-1]).startswith(ASSUMED)


def assumptions(module: GraphModule) -> list[str]:
    """What the graph asserts of the ways that forward takes."""
    return list(dict.fromkeys(str(n.args[-1]) for n in module.graph.nodes if is_own(n)))


def unknowns(size: Any) -> set[Any]:
    """Symbols in a size that stand for what only the numbers in tensors tell."""
    if not isinstance(size, (SymInt, SymBool)):
        return set()
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # slow to import

    return free_unbacked_symbols(size)


def _named(site: Site) -> str:
    return f"{Path(site[0]).name}:{site[1]}"


def alike(args: Any) -> list[Any]:
    """Inputs with the same numbers in all rows: those of the first, a middle and the last one.
    The last axis of real numbers (features) stays as it is.
    """

    def repeated(value: Any, share: float) -> Any:
        if not isinstance(value, Tensor):
            return value
        axes = range(value.dim() - (real_or_complex(value) and value.dim() > 1))
        for axis in axes:
            if value.shape[axis] > 1:
                place = round(share * (value.shape[axis] - 1))
                value = value.narrow(axis, place, 1).expand_as(value)
        return value.contiguous()

    return [pytree.tree_map(lambda v, s=share: repeated(v, s), args) for share in (0.0, 0.5, 1.0)]


def watched(call: Callable[[Any], Any], runs: list[Any]) -> tuple[Watch, list[Any]]:
    """What `call` decides in `runs`, and those which it takes."""
    watch, taken = Watch(), []
    for args in runs:
        with contextlib.suppress(Exception), watch:
            call(args)
            taken.append(args)
    return watch, taken
