"""restore: new weights for the columns that stay. Y = X W^T + b, K kept, P removed, d = ridge *
mean(diag G_KK).

    none        W_K
    bias        W_K, b + W_P mu_P                                                   FLAP
    fasp        W G_:K (G_KK + dI)^-1,             G = X^T X                        FASP
    obs         W_K + W_P G_PK (G_KK + dI)^-1,     the update of OBS: d holds the step  SlimGPT
    affine      W_K + W_P C_PK (C_KK + dI)^-1,     C = G/N - mu mu^T, b + W mu - W_K* mu_K
    asymmetric  affine + F_:K (C_KK + dI)^-1,      F = cov(t - W x, x), b + mean(t - W x)
    residual    affine + F_:K (C_KK + dI)^-1 / 2

    outputs     residual where groups have several consumers, else affine; then steps of all
                layers at once (passes/correct.py)

These aim at t, what the dense model has there (passes/drift.py): asymmetric at the consumer's own
output, residual at the sum that it enters. Half the way is what measured best:
all of it fits noise of the pruned path (docs/accuracy.md).

b is changed only where the consumer has one; without, G takes the place of C and no bias is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drift import Drift
from .observe import Moments

RESTORES = ("none", "bias", "fasp", "obs", "affine", "asymmetric", "residual", "outputs")
TOWARDS = {"asymmetric": 1.0, "residual": 0.5, "outputs": 0.5}


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
    if moments is None:
        if method != "none":
            raise ValueError(f"restore {method} needs calibration data")
        return Restored(weight * keep, bias, float("nan"), float("nan"))
    total, gone = _power(weight, moments), weight[:, ~keep].double()
    mean, pull = moments.mean.double(), TOWARDS.get(method, 0.0)
    centred = centres(method, bias)
    extra = None
    if drift is not None and pull:
        extra = drift.cross / drift.tokens - (torch.outer(drift.mean, mean) if centred else 0)
    damped = ridge if method not in ("none", "bias") else None
    shrunk = weight[:, keep].double() if method == "fasp" else None
    fit = _refit(gone, moments, centred, keep, damped, extra, pull, shrunk)
    b, shift, offset = bias, gone.new_zeros(()), gone.new_zeros(())
    new = weight * keep
    new[:, keep] = (weight[:, keep].double() + fit.step).to(weight.dtype)
    if bias is not None and centred:
        shift = gone @ mean[~keep]  # what the bias must make up for without a repair
        b = bias.double() + shift - fit.step @ mean[keep]
        if drift is not None:
            offset = pull * drift.mean
            b = b + offset
    return Restored(
        new,
        None if b is None else b.to(weight.dtype),
        float((fit.before + shift.square().sum()).clamp_min(0) / total),
        float((fit.after + offset.square().sum()).clamp_min(0) / total),
    )


def centres(method: str, bias: Tensor | None) -> bool:
    """Whether a repair is about the mean, since it refits the bias."""
    return bias is not None and method not in ("none", "fasp", "obs")


@dataclass(frozen=True)
class _Fit:
    """W*_K = W_K + step; tr(E S E^T) of the error E = W - W* without and with the step."""

    step: Tensor
    before: Tensor
    after: Tensor


def _refit(
    gone: Tensor,
    moments: Moments,
    centred: bool,
    keep: Tensor,
    ridge: float | None,
    extra: Tensor | None,
    pull: float,
    shrunk: Tensor | None,
) -> _Fit:
    """argmin ||X (W - W*)^T||^2 + d ||step||^2 over columns in `keep`, for second moments S:
    step = R (S_KK + dI)^-1 with R = W_P S_PK + pull * extra; ridge None: no step. `gone`: W_P.
    `shrunk`: W_K where the ridge is on W*_K, not on the step: R - d W_K.

    Since step S_KK = R - d step, the error is tr(W_P S_PP W_P^T) - 2 <step, W_P S_PK>
    + <step, R> - d ||step||^2, with no further product.
    """
    # without a mean to cancel, W_P S keeps the precision of S
    dtype = torch.float64 if centred else moments.gram.dtype
    away = gone.to(dtype) @ moments.gram[~keep].to(dtype)
    inside, cross = (away[:, part].double().div_(moments.tokens) for part in (~keep, keep))
    del away  # these are large: memory of a repair is a few Gram matrices
    mean = moments.mean.double()
    if centred:
        shift = gone @ mean[~keep]
        inside -= torch.outer(shift, mean[~keep])
        cross -= torch.outer(shift, mean[keep])
    before = (inside * gone).sum()
    if ridge is None:
        return _Fit(torch.zeros_like(cross), before, before)
    right = cross if extra is None else cross + pull * extra[:, keep]
    system = moments.gram[keep][:, keep].double().div_(moments.tokens)
    if centred:
        system -= torch.outer(mean[keep], mean[keep])
    damping = ridge * system.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    system.diagonal().add_(damping)
    right = right if shrunk is None else right - damping * shrunk
    factor, info = torch.linalg.cholesky_ex(system)
    if int(info):
        step = right @ torch.linalg.pinv(system, hermitian=True)
        right_met = step @ system
    else:
        del system
        step, right_met = torch.cholesky_solve(right.T, factor).T, right
        del factor
    after = before + (step * right_met).sum() - 2 * (step * cross).sum()
    after -= damping * step.square().sum()
    return _Fit(step, before, after)


def _power(w: Tensor, moments: Moments) -> Tensor:
    """||X W^T||^2 per token: it only scales the errors, so the precision of the moments is kept."""
    rows = w.to(moments.gram.dtype)
    total = ((rows @ moments.gram) * rows).sum().double() / moments.tokens
    return total.clamp_min(torch.finfo(torch.float64).tiny)
