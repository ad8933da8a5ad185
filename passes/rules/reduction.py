"""Reductions: a plain sum obeys the sum law by itself; every other reduction mixes. Pooling
fixes positions.
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


def _pool1(call: Call) -> str:
    return _pool(call, 1)


def _pool2(call: Call) -> str:
    return _pool(call, 2)


def _pool3(call: Call) -> str:
    return _pool(call, 3)


_MIXED = (
    "mean",
    "amax",
    "amin",
    "argmax",
    "argmin",
    "all",
    "any",
    "prod",
    "var",
    "std",
    "logsumexp",
    "norm",
)

RULES: dict[str, Rule] = {
    "sum": _sum,
    **dict.fromkeys((*_MIXED, "linalg_vector_norm"), _mixed),
    **dict.fromkeys(("max", "min", "var_mean", "std_mean"), _pair),
    **dict.fromkeys(
        ("max_pool1d", "avg_pool1d", "adaptive_avg_pool1d", "upsample_nearest1d"), _pool1
    ),
    **dict.fromkeys(
        (
            "max_pool2d",
            "avg_pool2d",
            "adaptive_avg_pool2d",
            "upsample_nearest2d",
            "upsample_bilinear2d",
            "upsample_bicubic2d",
        ),
        _pool2,
    ),
    **dict.fromkeys(
        ("max_pool3d", "avg_pool3d", "adaptive_avg_pool3d", "upsample_nearest3d"), _pool3
    ),
}
