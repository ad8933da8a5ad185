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
    if not right and "->" not in call["equation"]:
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    terms = [_spread(term) for term in left.split(",")]
    fixed = " ".join(name for term in terms for name in term if f"{name[0]}'" in term)
    sides = ", ".join(" ".join(term) for term in terms) + " -> " + " ".join(_spread(right))
    return sides + (f"; fixed {fixed}" if fixed else "")


def _spread(term: str) -> list[str]:
    """The axes of an operand; a letter that comes again (a diagonal is read) gets a mark."""
    names: list[str] = []
    for letter in term.replace("...", "."):
        name = letter.replace(".", "...")
        while name in names:
            name += "'"
        names.append(name)
    return names


def _baddbmm(call: Call) -> str:
    added = " ".join(["b", "n", "o"][3 - len(call["self"]) :])
    return f"{added}, b n i, b i o -> b n o"


def _grouped_mm(call: Call) -> str:
    """`offs` says where each group ends along the axis that the operands do not share."""
    ends = "g" if call.get("offs") is not None else ""
    axes = {
        (2, 3): f"t k, g k n, {ends} -> t n; fixed t g",
        (3, 2): f"g t k, k n, {ends} -> t n; fixed n g",
        (2, 2): f"t k, k n, {ends} -> g t n; fixed k g",
        (3, 3): "g t k, g k n -> g t n",
    }
    return axes[len(call["self"]), len(call["mat2"])]


RULES: dict[str, Rule] = {
    "linear": "... i, o i, o? -> ... o",
    "addmm": _addmm,
    "addmv": "n, n i, i -> n",
    "mm": "n i, i o -> n o",
    "mv": "n i, i -> n",
    "dot": "i, i -> ",
    "vdot": "i, i -> ",
    "bmm": "b n i, b i o -> b n o",
    "baddbmm": _baddbmm,
    "matmul": _matmul,
    "_grouped_mm": _grouped_mm,
    "einsum": _einsum,
    "bilinear": "... i, ... j, o i j, o? -> ... o",
    "outer": "n, m -> n m",
}
