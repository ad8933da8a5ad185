"""Attention: d is summed (the rewriter pins the softmax scale 1/sqrt(d)), s is a softmax axis.

With enable_gqa, head h reads KV head h // (H / KV); passes/axes.py repeats the labels of K and V.
"""

from __future__ import annotations

from . import Call, Rule


def _sdpa(call: Call) -> str:
    mask = call.get("attn_mask")
    axes = (
        "" if mask is None else ", " + " ".join(("... h t s" if len(mask) > 2 else "t s").split())
    )
    return f"... h t d, ... h s d, ... h s v{axes} -> ... h t v; mixed s"


RULES: dict[str, Rule] = {"scaled_dot_product_attention": _sdpa}
