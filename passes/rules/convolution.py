"""Convolutions: channels are summed, kernel and spatial positions are fixed. Groups are
handled in passes/places.py.
"""

from __future__ import annotations

from . import Call, Rule


def _conv(call: Call) -> str:
    n = len(call["weight"]) - 2
    batch = "n " if len(call["input"]) == n + 2 else ""
    space, kernel, out = (" ".join(f"{x}{k}" for k in range(n)) for x in ("x", "k", "y"))
    weight = f"i o {kernel}" if call.get("transposed", False) else f"o i {kernel}"
    return f"{batch}i {space}, {weight}, o? -> {batch}o {out}; fixed {space} {kernel} {out}"


def _transposed(call: Call) -> str:
    return _conv(Call({**call.arguments, "transposed": True}))


RULES: dict[str, Rule] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
    "conv_transpose1d": _transposed,
    "conv_transpose2d": _transposed,
    "conv_transpose3d": _transposed,
}
