"""restore: new weights for the columns that stay. Y = X W^T + b, K kept, P removed, d = ridge *
mean(diag G_KK).

    none        W_K
    bias        W_K, b + W_P mu_P                                                   FLAP
    fasp        W G_:K (G_KK + dI)^-1              G = X^T X                        FASP
    affine      W_K + W_P C_PK (C_KK + dI)^-1,     C = G/N - mu mu^T, b + W mu - W_K* mu_K
    asymmetric  affine + F_:K (C_KK + dI)^-1,      F = cov(t - W x, x), b + mean(t - W x)
    residual    affine + F_:K (C_KK + dI)^-1 / 2

The last two aim at t, what the dense model has there (passes/drift.py): asymmetric at the
consumer's own output, residual at the sum that it enters. Half the way is what measured best:
all of it fits noise of the pruned path (docs/accuracy.md).

b is changed only where the consumer has one; without, G takes the place of C and no bias is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drift import Drift
from .observe import Moments

RESTORES = ("none", "bias", "fasp", "affine", "asymmetric", "residual")
TOWARDS = {"asymmetric": 1.0, "residual": 0.5}


@dataclass(frozen=True)
class Restored:
    """Dense-shaped weight [out, in] (removed columns zero), bias, and ||error||^2 / ||Y||^2
    without and with repair, Y being the consumer's output on the pruned path.
    """

    weight: Tensor
    bias: Tensor | None
    error_before: float
    error_after: float


def restore(
    method: str,
    weight: Tensor,
    bias: Tensor | None,
    moments: Moments | None,
    keep: Tensor,
    ridge: float,
    drift: Drift | None = None,
) -> Restored:
    """Weights for the kept columns (`keep`: bool [in]). `drift`: for the methods in TOWARDS."""
    w = weight.double()
    cut = w * keep
    new, b = cut, bias
    if moments is None:
        if method != "none":
            raise ValueError(f"restore {method} needs calibration data")
        return Restored(cut.to(weight.dtype), bias, float("nan"), float("nan"))
    gram, mean = moments.gram.double(), moments.mean.double()
    if method not in ("none", "bias"):
        centred = method != "fasp" and bias is not None
        second = gram / moments.tokens - (torch.outer(mean, mean) if centred else 0)
        extra = torch.zeros_like(w) if drift is None else drift.cross / drift.tokens
        if drift is not None and centred:
            extra = extra - torch.outer(drift.mean, mean)
        new = torch.zeros_like(w)
        pull = TOWARDS.get(method, 0.0)
        new[:, keep] = _least_squares(w, second, keep, ridge, pull * extra[:, keep])
    if bias is not None and method not in ("none", "fasp"):
        b = bias.double() + (w - new) @ mean
        if drift is not None:
            b = b + TOWARDS.get(method, 0.0) * drift.mean
    return Restored(
        new.to(weight.dtype),
        None if b is None else b.to(weight.dtype),
        _error(w, cut, bias, bias, moments),
        _error(w, new, bias, b, moments),
    )


def _least_squares(w: Tensor, second: Tensor, keep: Tensor, ridge: float, extra: Tensor) -> Tensor:
    """argmin ||X (W - W*)^T||^2 + d ||W* - W_K||^2, over columns in `keep`, as W_K + (W_P S_PK +
    extra) (S_KK + dI)^-1.
    """
    kept = second[keep][:, keep]
    cross = second[~keep][:, keep]
    diagonal = kept.diagonal()
    damping = ridge * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    system = kept + damping * torch.eye(len(kept), dtype=kept.dtype, device=kept.device)
    factor, info = torch.linalg.cholesky_ex(system)
    right = (w[:, ~keep] @ cross + extra).T
    if int(info):
        return w[:, keep] + torch.linalg.lstsq(system, right, driver="gelsd").solution.T
    return w[:, keep] + torch.cholesky_solve(right, factor).T


def _error(
    w: Tensor, new: Tensor, bias: Tensor | None, b: Tensor | None, moments: Moments
) -> float:
    """||X (W - W*)^T + b - b*||^2 / ||X W^T||^2 from the moments alone."""
    gram = moments.gram.double() / moments.tokens
    delta = w - new
    error = torch.einsum("oi,ij,oj->", delta, gram, delta)
    if bias is not None and b is not None:
        shift = bias.double() - b.double()
        error = error + 2 * (delta @ moments.mean.double() * shift).sum() + shift.square().sum()
    total = torch.einsum("oi,ij,oj->", w, gram, w)
    return float(error.clamp_min(0) / total.clamp_min(torch.finfo(torch.float64).tiny))
