"""Attention: d is summed (the rewriter pins the softmax scale 1/sqrt(d)), s is a softmax axis.

With enable_gqa, head h reads KV head h // (H / KV); passes/axes.py repeats the labels of K and V.
"""

from __future__ import annotations

from . import Call, Rule


def _sdpa(call: Call) -> str:
    mask = call.get("attn_mask")
    heads = "... h " if len(call["query"]) > 2 else ""
    axes = "" if mask is None else ", " + (f"{heads}t s" if len(mask) > 2 else "t s")
    return f"{heads}t d, {heads}s d, {heads}s v{axes} -> {heads}t v; mixed s"


RULES: dict[str, Rule] = {"scaled_dot_product_attention": _sdpa}
