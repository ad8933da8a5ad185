"""Contractions: the axis that is in both operands and not in the result is summed."""

from __future__ import annotations

from . import Call, Rule


def _addmm(call: Call) -> str:
    bias = {0: "", 1: "o", 2: "n o"}[len(call["self"])]
    return f"{bias}, n i, i o -> n o"


def _matmul(call: Call) -> str:
    left, right = len(call["self"]), len(call["other"])
    if left == 1 and right == 1:
        return "i, i -> "
    if left == 1:
        return "i, ... i o -> ... o"
    if right == 1:
        return "... n i, i -> ... n"
    return "... n i, ... i o -> ... n o"


def _einsum(call: Call) -> str:
    left, _, right = call["equation"].replace(" ", "").partition("->")

    def spread(term: str) -> str:
        return " ".join(term.replace("...", ".")).replace(".", "...")

    if not right and "->" not in call["equation"]:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    return ", ".join(spread(term) for term in left.split(",")) + " -> " + spread(right)


def _baddbmm(call: Call) -> str:
    added = " ".join(["b", "n", "o"][3 - len(call["self"]) :])
    return f"{added}, b n i, b i o -> b n o"


RULES: dict[str, Rule] = {
    "linear": "... i, o i, o? -> ... o",
    "addmm": _addmm,
    "addmv": "n, n i, i -> n",
    "mm": "n i, i o -> n o",
    "mv": "n i, i -> n",
    "dot": "i, i -> ",
    "bmm": "b n i, b i o -> b n o",
    "baddbmm": _baddbmm,
    "matmul": _matmul,
    "einsum": _einsum,
    "bilinear": "... i, ... j, o i j, o? -> ... o",
    "outer": "n, m -> n m",
}
