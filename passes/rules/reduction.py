"""Reductions: a plain sum obeys the sum law by itself, a mean the mean law; every other reduction
mixes. Pooling fixes positions.
"""

from __future__ import annotations

from . import Call, Rule


def _reduced(call: Call, kind: str) -> str:
    rank = len(call.get("self", call.get("input", ())))
    dims = call.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    gone = {d % rank for d in dims} if dims else set(range(rank))
    names = [f"a{k}" for k in range(rank)]
    keep = call.get("keepdim", False)
    out = [("1" if keep else "") if k in gone else name for k, name in enumerate(names)]
    mark = f"; {kind} " + " ".join(names[k] for k in sorted(gone)) if gone else ""
    return f"{' '.join(names)} -> {' '.join(out)}{mark}"


def _sum(call: Call) -> str:
    return _reduced(call, "sum")


def _mean(call: Call) -> str:
    return _reduced(call, "mean")


def _mixed(call: Call) -> str:
    return _reduced(call, "mixed")


def _pair(call: Call) -> str:
    signature, _, marks = _reduced(call, "mixed").partition(";")
    left, _, right = signature.partition("->")
    return f"{left} -> {right}, {right};{marks}"


def _pool(call: Call, spatial: int) -> str:
    lead = " ".join(["n", "c"][2 - (len(call.get("self", call.get("input"))) - spatial) :])
    space, out = (" ".join(f"{x}{k}" for k in range(spatial)) for x in ("x", "y"))
    return f"{lead} {space} -> {lead} {out}; fixed {space} {out}"


def _norm(call: Call) -> str:
    """Zeros do not count in a p-norm with p > 0."""
    order = call.get("ord", call.get("p", 2))
    return _sum(call) if order > 0 else _mixed(call)


def _spatial(n: int) -> Rule:
    return lambda call: _pool(call, n)


_MIXED = (
    *("amax", "amin", "argmax", "argmin", "all", "any", "prod", "var", "std"),
    "logsumexp",
)
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "upsample_nearest")
_UPSAMPLES = {
    **dict.fromkeys(("upsample_linear1d", "_upsample_nearest_exact1d"), 1),
    **dict.fromkeys(("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_nearest_exact2d"), 2),
    **dict.fromkeys(("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"), 2),
    "upsample_trilinear3d": 3,
}

RULES: dict[str, Rule] = {
    "sum": _sum,
    "mean": _mean,
    **dict.fromkeys(_MIXED, _mixed),
    **dict.fromkeys(("norm", "linalg_vector_norm"), _norm),
    "count_nonzero": _sum,
    **dict.fromkeys(("max", "min", "var_mean", "std_mean"), _pair),
    **dict.fromkeys(("median", "nanmedian", "mode", "kthvalue"), _pair),
    "_cdist_forward": "... p c, ... q c -> ... p q; mixed c",
    **{f"{pool}{n}d": _spatial(n) for n in (1, 2, 3) for pool in _POOLS},
    **{name: _spatial(n) for name, n in _UPSAMPLES.items()},
    "max_pool2d_with_indices": _spatial(2),
}
