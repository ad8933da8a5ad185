"""choices: ops that choose positions of an axis by their scores, and which of them are used.

    topk(x, k), max(x, dim), argmin(x, dim)    k, one, one
    sort(x, dim)[..., :n], [..., -1]           the first n, the last

A position may go where the places that are used do not depend on the number of positions.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from .visit import bind, op_name

CHOICES = {"topk": 1, "sort": 1, "argmax": 0, "argmin": 0, "argsort": 0, "max": 1, "min": 1}
"""Op -> which of its results holds the places."""
LEAST_FIRST = {"argmin", "min"}


def taken(node: Node, shape: tuple[int, ...]) -> int:
    """How many of the first places of a sorted axis of `shape` are used, of the last as a negative
    number; 0: all are, or which ones depends on the size. Other choices take the first.
    """
    if "sort" not in op_name(node):
        return 1
    dim = bind(node, node.args, node.kwargs)["dim"] % len(shape)
    ends = [_end(user, dim, shape) for item in _results(node) for user in item.users]
    if min(ends, default=0) > 0:
        return max(ends)
    return min(ends, default=0) if max(ends, default=0) < 0 else 0


def _end(user: Node, dim: int, shape: tuple[int, ...]) -> int:
    """The same of one user."""
    bound, size, name = bind(user, user.args, user.kwargs), shape[dim], op_name(user)
    if name not in ("slice", "select") or (bound["dim"] or 0) % len(shape) != dim:
        return 0
    if name == "select":
        low = bound["index"]
        high = low + 1 if isinstance(low, int) and low != -1 else None
    else:
        low, high = bound["start"] or 0, bound["end"]
    if not isinstance(low, int) or not (high is None or isinstance(high, int)):
        return 0
    if low < 0:
        return low if -low < size and (high is None or high < 0 or high >= size) else 0
    return high if high is not None and 0 < high < size else 0


def never(node: Node, shape: tuple[int, ...]) -> float:
    """The score that is never among those that a choice takes."""
    bound = bind(node, node.args, node.kwargs)
    falling = bound.get("largest", bound.get("descending", op_name(node) not in LEAST_FIRST))
    return float("-inf") if bool(falling) == (taken(node, shape) > 0) else float("inf")


def _results(node: Node) -> list[Node]:
    """The nodes that hold a result each."""
    several = [user for user in node.users if user.target is operator.getitem]
    return several or [node]
