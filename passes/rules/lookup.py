"""Lookups: the looked-up axis is fixed by the data, the others are carried."""

from __future__ import annotations

from . import Call, Rule


def _names(call: Call, key: str = "self") -> list[str]:
    return [f"a{k}" for k in range(len(call[key]))]


def _embedding(call: Call) -> str:
    ids = " ".join(f"p{k}" for k in range(len(call["indices"])))
    return f"v c, {ids} -> {ids} c; fixed v"


def _gather(call: Call) -> str:
    names = _names(call)
    if not names:
        return ", -> "
    at = call["dim"] % len(names)
    short = [k for k, n in enumerate(call["index"]) if k != at and n != call["self"][k]]
    out = [f"b{k}" if k in short or k == at else name for k, name in enumerate(names)]
    fixed = " ".join([names[at], *(names[k] for k in short)])
    return f"{' '.join(names)}, {' '.join(out)} -> {' '.join(out)}; fixed {fixed}"


def _scatter(call: Call) -> str:
    """self and result share their axes; index and src have their own axis `dim`."""
    names = _names(call)
    at = call["dim"] % max(len(names), 1)
    short = [k for k, n in enumerate(call["index"]) if k != at and n != call["self"][k]]
    inner = [f"b{k}" if k in short or k == at else name for k, name in enumerate(names)]
    source = f", {' '.join(inner)}" if isinstance(call.get("src"), tuple) else ""
    fixed = " ".join([names[at], f"b{at}", *(f"{x}{k}" for k in short for x in "ab")])
    joined = " ".join(names)
    return f"{joined}, {' '.join(inner)}{source} -> {joined}; fixed {fixed}"


def _index_add(call: Call) -> str:
    """self[..., index[j], ...] += source[..., j, ...]."""
    names = _names(call)
    at = call["dim"] % max(len(names), 1)
    source = [*names[:at], "j", *names[at + 1 :]]
    joined = " ".join(names)
    return f"{joined}, j, {' '.join(source)} -> {joined}; fixed {names[at]} j"


def _repeated(call: Call) -> str:
    """Each place as often as the data say."""
    if "self" not in call.arguments:
        return "r -> j; fixed r"
    names = _names(call)
    if call.get("dim") is None:
        return f"{' '.join(names)}, r? -> j; fixed {' '.join(names)} r"
    at = call["dim"] % len(names)
    out = [*names[:at], "j", *names[at + 1 :]]
    return f"{' '.join(names)}, r? -> {' '.join(out)}; fixed {names[at]} r"


def _along(call: Call) -> str:
    names = _names(call)
    joined = " ".join(names)
    return f"{joined} -> {joined}; fixed {names[call.get('dim', -1) % len(names)]}"


def _topk(call: Call) -> str:
    names = _names(call)
    dim = call.get("dim", -1) % len(names)
    out = " ".join([*names[:dim], "k", *names[dim + 1 :]])
    return f"{' '.join(names)} -> {out}, {out}; fixed {names[dim]} k"


def _sort(call: Call) -> str:
    names = _names(call)
    joined = " ".join(names)
    return f"{joined} -> {joined}, {joined}; fixed {names[call.get('dim', -1) % len(names)]}"


RULES: dict[str, Rule] = {
    "embedding": _embedding,
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce"), _scatter),
    **dict.fromkeys(("index_add", "index_copy"), _index_add),
    **dict.fromkeys(("cumsum", "cumprod", "argsort", "logcumsumexp"), _along),
    **dict.fromkeys(("cummax", "cummin"), _sort),
    "topk": _topk,
    "repeat_interleave": _repeated,
    "sort": _sort,
}
