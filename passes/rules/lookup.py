"""Lookups: the looked-up axis is fixed by the data, the others are carried."""

from __future__ import annotations

from . import Call, Rule


def _embedding(call: Call) -> str:
    ids = " ".join(f"p{k}" for k in range(len(call["indices"])))
    return f"v c, {ids} -> {ids} c; fixed v"


def _gather(call: Call) -> str:
    rank = len(call["self"])
    dim = call["dim"] % rank
    names = [f"a{k}" for k in range(rank)]
    source = [*names[:dim], "x", *names[dim + 1 :]]
    index = " ".join(names)
    return f"{' '.join(source)}, {index} -> {index}; fixed {index} x"


def _along(call: Call) -> str:
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    return f"{' '.join(names)} -> {' '.join(names)}; fixed {names[call.get('dim', -1) % rank]}"


def _topk(call: Call) -> str:
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    dim = call.get("dim", -1) % rank
    out = " ".join([*names[:dim], "k", *names[dim + 1 :]])
    return f"{' '.join(names)} -> {out}, {out}; fixed {names[dim]} k"


def _sort(call: Call) -> str:
    rank = len(call["self"])
    names = [f"a{k}" for k in range(rank)]
    joined = " ".join(names)
    return f"{joined} -> {joined}, {joined}; fixed {names[call.get('dim', -1) % rank]}"


RULES: dict[str, Rule] = {
    "embedding": _embedding,
    "gather": _gather,
    "cumsum": _along,
    "cumprod": _along,
    "topk": _topk,
    "sort": _sort,
    "argsort": _along,
}
