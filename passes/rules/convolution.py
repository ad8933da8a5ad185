"""Convolutions: channels are summed, kernel and spatial positions are fixed; along a dim where the
kernel is one point, moves by one and pads nothing, the position is carried. Groups are handled in
passes/places.py.
"""

from __future__ import annotations

from typing import Any

from . import Call, Rule


def _conv(call: Call) -> str:
    n = len(call["weight"]) - 2
    batch = "n " if len(call["input"]) == n + 2 else ""
    point = [_is_point(call, k) for k in range(n)]
    space, kernel = (" ".join(f"{x}{k}" for k in range(n)) for x in ("x", "k"))
    out = " ".join(f"{'x' if point[k] else 'y'}{k}" for k in range(n))
    fixed = " ".join(f"x{k} k{k} y{k}" for k in range(n) if not point[k])
    weight = f"i o {kernel}" if call.get("transposed", False) else f"o i {kernel}"
    return f"{batch}i {space}, {weight}, o? -> {batch}o {out}" + (
        f"; fixed {fixed}" if fixed else ""
    )


def _is_point(call: Call, k: int) -> bool:
    """Whether the convolution acts on each position of its k-th spatial dim by itself."""

    def at(name: str, default: int) -> Any:
        held = call.get(name, default)
        return held[k % len(held)] if isinstance(held, (list, tuple)) else held

    still = at("stride", 1) == 1 and at("padding", 0) in (0, "valid", "same")
    return call["weight"][2 + k] == 1 and still and at("output_padding", 0) == 0


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
