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
    if moments is None:
        if method != "none":
            raise ValueError(f"restore {method} needs calibration data")
        return Restored(cut.to(weight.dtype), bias, float("nan"), float("nan"))
    mean, pull = moments.mean.double(), TOWARDS.get(method, 0.0)
    centred = bias is not None and method not in ("none", "fasp")
    extra = None
    if drift is not None and pull:
        extra = drift.cross / drift.tokens - (torch.outer(drift.mean, mean) if centred else 0)
    fit = _refit(
        w, moments, centred, keep, ridge if method not in ("none", "bias") else None, extra, pull
    )
    new, b, shift, offset = cut, bias, w.new_zeros(()), w.new_zeros(())
    new[:, keep] += fit.step
    if bias is not None and centred:
        shift = w[:, ~keep] @ mean[~keep]  # what the bias must make up for without a repair
        b = bias.double() + (w - new) @ mean
        if drift is not None:
            offset = pull * drift.mean
            b = b + offset
    total = _power(w, moments)
    return Restored(
        new.to(weight.dtype),
        None if b is None else b.to(weight.dtype),
        float((fit.before + shift.square().sum()).clamp_min(0) / total),
        float((fit.after + offset.square().sum()).clamp_min(0) / total),
    )


@dataclass(frozen=True)
class _Fit:
    """W*_K = W_K + step; tr(E S E^T) of the error E = W - W* without and with the step."""

    step: Tensor
    before: Tensor
    after: Tensor


def _refit(
    w: Tensor,
    moments: Moments,
    centred: bool,
    keep: Tensor,
    ridge: float | None,
    extra: Tensor | None,
    pull: float,
) -> _Fit:
    """argmin ||X (W - W*)^T||^2 + d ||step||^2 over columns in `keep`, for second moments S:
    step = R (S_KK + dI)^-1 with R = W_P S_PK + pull * extra; ridge None: no step.

    Since step S_KK = R - d step, the error is tr(W_P S_PP W_P^T) - 2 <step, W_P S_PK>
    + <step, R> - d ||step||^2, with no further product.
    """
    # without a mean to cancel, W_P S keeps the precision of S
    dtype = torch.float64 if centred else moments.gram.dtype
    gone = w[:, ~keep]
    away = (gone.to(dtype) @ moments.gram[~keep].to(dtype)).double().div_(moments.tokens)
    mean = moments.mean.double()
    if centred:
        away -= torch.outer(gone @ mean[~keep], mean)
    before, cross = (away[:, ~keep] * gone).sum(), away[:, keep]
    if ridge is None:
        return _Fit(torch.zeros_like(cross), before, before)
    right = cross if extra is None else cross + pull * extra[:, keep]
    system = moments.gram[keep][:, keep].double().div_(moments.tokens)
    if centred:
        system -= torch.outer(mean[keep], mean[keep])
    damping = ridge * system.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system.diagonal().add_(damping)
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        step = torch.linalg.lstsq(system, right.T, driver="gelsd").solution.T
        right_met = step @ system
    else:
        step, right_met = torch.cholesky_solve(right.T, factor).T, right
    after = before + (step * (right_met - 2 * cross)).sum() - damping * step.square().sum()
    return _Fit(step, before, after)


def _power(w: Tensor, moments: Moments) -> Tensor:
    """||X W^T||^2 per token: it only scales the errors, so the precision of the moments is kept."""
    rows = w.to(moments.gram.dtype)
    total = ((rows @ moments.gram) * rows).sum().double() / moments.tokens
    return total.clamp_min(torch.finfo(torch.float64).tiny)
