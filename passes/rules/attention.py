"""Attention. d is summed: the rewriter pins the softmax scale 1/sqrt(d) to the dense one. s
is a softmax axis.
"""

from __future__ import annotations

from . import Call, Rule


def _sdpa(call: Call) -> str:
    grouped = call.get("enable_gqa", False) and call["query"][-3] != call["key"][-3]
    heads = "g" if grouped else "h"
    mask = call.get("attn_mask")
    if mask is None:
        return f"... h t d, ... {heads} s d, ... {heads} s v -> ... h t v; mixed s"
    names = (
        ["... h t s", "... h t s", "t s", "h t s"][min(len(mask), 3)]
        if len(mask) < 4
        else "... h t s"
    )
    if len(mask) == 2:
        names = "t s"
    return f"... h t d, ... {heads} s d, ... {heads} s v, {names} -> ... h t v; mixed s"


RULES: dict[str, Rule] = {"scaled_dot_product_attention": _sdpa}
