"""watch: what the numbers in tensors decide while a model runs, line by line."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .fresh import fresh_inputs
from .tracing import real_or_complex

Site = tuple[tuple[str, int, int], ...]  # file, line, place in its code; the innermost first
FRESH = 4  # runs of each kind that are compared beside those that were watched
_SELECTING = {
    *(torch.nonzero, Tensor.nonzero, torch.where, Tensor.argwhere, torch.argwhere),
    *(torch.masked_select, Tensor.masked_select, Tensor.__getitem__),
}
_OURS = str(Path(__file__).parent) + os.sep
_TORCH = (str(Path(torch.__file__).parent) + os.sep, "<eval", "<frozen")


def site_of_call() -> Site:
    """The calls outside torch and this package that lead to one."""
    frame, lines = sys._getframe(2), list[tuple[str, int, int]]()
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS) and lines:
            break
        if not file.startswith((_OURS, *_TORCH)):
            lines.append((file, frame.f_lineno, frame.f_lasti))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(lines)


class Watch(TorchFunctionMode):
    """What is decided at every line while a model runs: `ways` holds the truth of tensors, `most`
    how often it was asked for in a run, `rows` whether anything was selected, or a number positive;
    `partly` lines that selected some of all positions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ways: dict[Site, set[bool]] = defaultdict(set)
        self.most: Counter[Site] = Counter()
        self.rows: dict[Site, set[bool]] = defaultdict(set)
        self.partly: set[Site] = set()
        self._asked: Counter[Site] = Counter()

    @property
    def undecided(self) -> bool:
        """Whether a tensor was seen to be true and to be false at one place."""
        return any(len(ways) == 2 for ways in self.ways.values())

    def begin(self) -> None:
        """Another run."""
        self._asked.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if is_truth(func, args):
            site = site_of_call()
            self.ways[site].add(result)
            self._asked[site] += 1
            self.most[site] = max(self.most[site], self._asked[site])
        elif selects(func, args):
            self._note(args[0], result, site_of_call())
        elif func in (Tensor.item, Tensor.tolist):
            numbers = [n for n in pytree.tree_leaves(result) if type(n) is int]
            self.rows[site_of_call()].update(n > 0 for n in numbers)
        return result

    def _note(self, source: Tensor, result: Any, site: Site) -> None:
        found = result if isinstance(result, Tensor) else result[0]
        self.rows[site].add(found.numel() > 0)
        if source.dim() == 1 and len(found) < len(source):
            self.partly.add(site)


def is_truth(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call asks if a tensor is true."""
    return func is Tensor.__bool__ or (func is Tensor.item and args[0].dtype == torch.bool)


def selects(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether a call takes the places where a tensor is true."""
    if func not in _SELECTING or not isinstance(args[0], Tensor):
        return False
    if func is not Tensor.__getitem__:
        return len(args) == 1 or "masked" in func.__name__
    picks = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(pick, Tensor) and pick.dtype == torch.bool for pick in picks)


def named(site: Site) -> str:
    """`file.py:12`."""
    return f"{Path(site[0][0]).name}:{site[0][1]}" if site else "an unknown line"


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


def further(args: Any) -> Iterator[Any]:
    """Fresh inputs of the same form: drawn, much larger, in another order, and with all rows but
    one alike.
    """

    def times(factor: float, value: Any) -> Any:
        return factor * value if isinstance(value, Tensor) and value.is_floating_point() else value

    def but_one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) < 2:
            return value
        return torch.cat([value[:1].expand_as(value[1:]), value[-1:]])

    for seed in range(FRESH):
        drawn, moved = (fresh_inputs(args, seed, False, way) for way in ("drawn", "rows"))
        shuffled = fresh_inputs(args, seed, False, "shuffled")
        yield from (drawn, moved, shuffled)
        yield from (pytree.tree_map(functools.partial(times, n), drawn) for n in (10, 1000))
        yield from (pytree.tree_map(but_one, moved), pytree.tree_map(but_one, drawn))


def watched(call: Callable[[Any], Any], runs: list[Any]) -> tuple[Watch, list[Any]]:
    """What `call` decides in `runs`, and those which it takes."""
    watch, taken = Watch(), []
    for args in runs:
        watch.begin()
        with contextlib.suppress(Exception), watch:
            call(args)
            taken.append(args)
    return watch, taken
