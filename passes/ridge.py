"""ridge: how strong the ridge of a repair is, by its error on tokens that it was not fitted to.

    step(d) = R Q (L + d)^-1 Q^T,    S_KK = Q L Q^T,    R as in passes/restore.py

One eigendecomposition serves all d. With H the second moments of the tokens that were held out (a
quarter: the last rows of every batch), about the mean of the others where the bias is refitted,

    error(d) = tr(E H E^T),    E = [W_P, -step(d)]

and the d of least error is taken, relative to mean(diag S_KK), for the repair on all tokens; the
part of a repair that goes towards the dense path (passes/drift.py) is left out of the comparison.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .observe import Moments
from .restore import centres

RIDGES = tuple(10.0 ** (power / 2) for power in range(-8, 1))  # 1e-4, 3e-4, .., 1


def held_out_ridge(
    method: str, weight: Tensor, bias: Tensor | None, fit: Moments, held: Moments, keep: Tensor
) -> float:
    """Of RIDGES the one for the repair `method` of columns `keep` (bool [in]) of weight [out, in].
    `fit`, `held`: of tokens to fit to, and of others.
    """
    mean = fit.mean.double() * float(centres(method, bias))
    second = _about(fit, mean)
    values, vectors = torch.linalg.eigh(second[keep][:, keep])
    scale = second[keep][:, keep].diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    gone, stays = weight[:, ~keep].double(), weight[:, keep].double()
    right = gone @ second[~keep][:, keep] @ vectors
    drawn = stays @ vectors if method == "fasp" else torch.zeros_like(right)
    other = _about(held, mean)
    inside = vectors.T @ other[keep][:, keep] @ vectors
    cross = gone @ other[~keep][:, keep] @ vectors
    errors = []
    for ridge in RIDGES:
        step = (right - ridge * scale * drawn) / (values.clamp_min(0) + ridge * scale)
        errors.append(float(((step @ inside - 2 * cross) * step).sum()))
    return RIDGES[min(range(len(RIDGES)), key=errors.__getitem__)]


def _about(found: Moments, mean: Tensor) -> Tensor:
    """Mean of (x - mean)(x - mean)^T."""
    own = found.mean.double()
    second = found.gram.double() / found.tokens
    return second - torch.outer(mean, own) - torch.outer(own, mean) + torch.outer(mean, mean)
