"""Ops that combine elements: labels that meet in one element, on the same dim, are one unit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .values import Arrays
from .visit import Visit, bind, op_name

# Pointwise ops that torch does not tag.
CARRY = {
    *("clone", "contiguous", "to", "_to_copy", "dropout", "type_as", "detach", "alias", "tril"),
    *("triu", "masked_fill", "where", "clamp", "gelu", "silu", "relu", "hardtanh", "hardswish"),
    *("softplus", "rand_like", "randn_like"),
    *("relu6", "selu", "celu", "hardsigmoid", "leaky_relu", "elu", "mish", "logsigmoid", "conj"),
    *("fill", "copy", "copy_", "fill_", "zero_", "nan_to_num", "float_power", "lift_fresh_copy"),
    *("_conj", "resolve_conj", "resolve_neg", "real", "imag", "isfinite", "isnan", "isinf"),
    *("square", "rsqrt", "bernoulli", "log_sigmoid", "log_sigmoid_forward", "floor_divide"),
    *(
        "__and__",
        "__or__",
        "__xor__",
        "complex",
        "polar",
        "angle",
        "sgn",
        "softsign",
        "native_dropout",
    ),
}
LINEAR = {"add", "sub", "neg", "rsub", "to", "_to_copy", "contiguous", "clone", "type_as", "alias"}
SCALING = {"mul", "div"}
UNDRAWN = {"training": False, "train": False, "dropout_p": 0.0}
"""Arguments with which nothing is drawn."""
DRAWN_LIKE = {"rand_like", "randn_like"}
LENDING = {"type_as"}  # of the second operand only the dtype is read


def meet_pointwise(visit: Visit, out: Any) -> Arrays:
    """Labels of one result: dims are aligned from the last, as torch broadcasts."""
    if not isinstance(out, Tensor):
        return {}
    values, rank = list(visit.values()), out.dim()
    values = values[:1] if visit.name in LENDING else values
    result: Arrays = {}
    for dim, size in enumerate(out.shape):
        held = [
            a.reshape([1] * (rank - len(v.shape)) + list(a.shape))
            for v in values
            if (a := v.arrays.get(dim - rank + len(v.shape))) is not None
        ]
        if held:
            result[dim] = visit.labels.meet(held)
            if _bends(visit, len(held)):
                visit.labels.mark("bent", [result[dim]], visit.name)
        elif size > 1:
            result[dim] = visit.fixed(f"a position of {visit.name}")
    return result


def _bends(visit: Visit, operands: int) -> bool:
    """Whether only permutations may pass: a non-linearity, or a factor per channel."""
    name = visit.name.rstrip("_")
    return name not in LINEAR and not (name in SCALING and operands == 1)


def is_pointwise(node: Node) -> bool:
    """Whether torch tags the op (or its form that does not write) so, or CARRY names it."""
    name = op_name(node)
    if node.target is torch.ops.aten.where.default:
        return False  # of one argument: nonzero
    if torch.Tag.pointwise in getattr(node.target, "tags", ()) or name in CARRY:
        return True
    if not name.endswith("_"):
        return False
    base = name.rstrip("_")
    packet = getattr(torch.ops.aten, base, None)
    overload = getattr(packet, getattr(node.target, "_overloadname", ""), None)
    return base in CARRY or (overload is not None and torch.Tag.pointwise in overload.tags)


def draws(node: Node) -> bool:
    """Whether the op draws a number for each position, one after the other: all of them change
    where there are fewer. What is drawn in the form of a contiguous tensor can be drawn as before,
    and gathered (passes/edits.py).
    """
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    bound = bind(node, node.args, node.kwargs)
    if any(bound.get(name) == never for name, never in UNDRAWN.items()):
        return False
    held = node.args[0].meta.get("val") if isinstance(node.args[0], Node) else None
    plain = isinstance(held, torch.Tensor) and held.is_contiguous()
    return not (op_name(node) in DRAWN_LIKE and plain)
