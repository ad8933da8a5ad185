"""Axis rules: what an op does to the axes of its operands, one line per op.

    "... i, o i, o? -> ... o"            linear: i is summed, o and ... are carried
    "... c, c?, c? -> ... c; mixed c"    layer_norm: every output on c depends on every input on c

An operand is a list of axis names; `...` stands for leading axes, aligned to the right; `?` marks
an operand that may be absent. With S_K keeping the index set K of an axis and 1_K zeroing the
rest, the kinds of an axis are

    carry   in the output:                     op(S_K x) = S_K op(x)
    sum     in operands, not in the output:    op(S_K x, S_K w) = op(1_K x, w)
    mean    S_K op(1_K x, w) = c op(S_K x, S_K w), with c != 1 a function of |K| / n alone: what the
            op divides by counts the positions (passes/norms.py puts c where they get fewer)
    mixed   no law holds
    fixed   the position itself has a meaning

A rule is a string, or a function of the call where attributes decide. Ops that only move elements
need no rule (they are executed on labels, passes/moves.py); ops that torch tags as pointwise carry
every axis. tests/test_oracle.py holds every rule against the laws on random tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import FaspGraphError

Rule = str | Callable[["Call"], str]
KINDS = ("carry", "sum", "mean", "mixed", "fixed")


@dataclass(frozen=True)
class Call:
    """One call of an op: argument values by schema name, tensors replaced by their shapes."""

    arguments: Mapping[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.arguments[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The argument's value, or `default` where it is absent or None."""
        value = self.arguments.get(name)
        return default if value is None else value


@dataclass(frozen=True)
class Axes:
    """A parsed rule: axis names per operand and output, and the kind of the axes that are not
    carry or sum.
    """

    operands: tuple[tuple[str, ...], ...]
    outputs: tuple[tuple[str, ...], ...]
    kinds: Mapping[str, str]

    def kind(self, axis: str, carried: bool) -> str:
        """The declared kind, else carry or sum by where the axis stands."""
        return self.kinds.get(axis, "carry" if carried else "sum")


def parse(rule: str) -> Axes:
    """`"... i, o i -> ... o; mixed o"` as Axes. FaspGraphError for an axis twice in one tensor."""
    signature, *marks = rule.split(";")
    left, arrow, right = signature.partition("->")
    if not arrow:
        raise ValueError(f"the rule {rule!r} has no '->'")
    kinds: dict[str, str] = {}
    for mark in marks:
        kind, *names = mark.split()
        if kind not in KINDS:
            raise ValueError(f"the rule {rule!r} names the kind {kind!r}; kinds are {KINDS}")
        kinds |= dict.fromkeys(names, kind)
    sides = (_sides(left), _sides(right))
    for axes in (axes for side in sides for axes in side):
        twice = {axis for axis in axes if axes.count(axis) > 1} - {"1"}
        if twice:
            raise FaspGraphError(
                f"the rule {rule!r} names the axis {min(twice)} twice in one tensor · help: give "
                "each dim a name of its own, and call an axis that must not change fixed"
            )
    return Axes(*sides, kinds)


def _sides(text: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(side.replace("?", " ").split()) for side in text.split(","))


def table() -> dict[str, Rule]:
    """All families merged; a rule that stands in two families is an error."""
    from . import attention, contraction, convolution, lookup, normalization, reduction, spectral

    families = (attention, contraction, convolution, lookup, normalization, reduction, spectral)
    merged: dict[str, Rule] = {}
    for family in families:
        twice = merged.keys() & family.RULES.keys()
        if twice:
            raise ValueError(f"rules defined twice: {sorted(twice)}")
        merged |= family.RULES
    return merged | CUSTOM


CUSTOM: dict[str, Rule] = {}


def probe(op: Callable[..., Any], sample: Sequence[Any]) -> str:
    """The rule of `op`, found by experiment on `sample` (passes/rules/laws.py)."""
    from .laws import probe as find

    return find(op, sample)


def register(op: str, rule: Rule) -> None:
    """Add the rule of a custom op, `namespace.name` or the name of an aten op without a rule.
    ValueError if it cannot be parsed, or calls an axis a mean: how the op counts is not known.
    """
    if isinstance(rule, str) and "mean" in parse(rule).kinds.values():
        raise ValueError(f"the rule {rule!r} of a custom op has a mean · help: call the axis mixed")
    CUSTOM[op] = rule
