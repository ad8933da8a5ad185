"""score: the utility of each column of a consumer Y = X W^T + b; the lowest go. W [out, in], G =
X^T X [in, in].

fasp        sum_i |W_ij| ||X_j||_2                       FASP, arXiv 2501.09412
wanda_l2    ||W_:j||_2 ||X_j||_2
magnitude   ||W_:j||_2
flap        Var(X_j) ||W_:j||_2^2                        FLAP, arXiv 2312.11983
random      uniform
taylor      E (g . W_:j X_j)^2 = (W^T A W)_jj E X_j^2    first-order Taylor, arXiv 1906.10771, with
            A of the outputs (passes/sensitivity.py) in place of a loss, g and X_j independent
numerical   what ||W (1 - z) X||^2 over masks z drops last, greedily, nothing refitted: the masked
            output error of Numerical Pruning (arXiv 2412.12441), Hessian (W^T W) o (X X^T)
obs         error after the others are refitted, greedy: passes/eliminate.py
rotation    obs, in the basis of a group where it can be turned (passes/rotate.py) that sorts its
            directions by the error of leaving out one, all else refitted
modegpt     G (G + d I)^-1 at jj, d = mean(diag G): ridge leverage; where a group can be turned the
            squared singular values of each block    MoDeGPT, arXiv 2408.09632
"""

from __future__ import annotations

import torch
from torch import Tensor

from .observe import Moments

SCORES = (
    *("fasp", "wanda_l2", "magnitude", "flap", "random", "taylor", "numerical"),
    *("obs", "rotation", "modegpt"),
)
NEEDS_DATA = {*SCORES} - {"magnitude", "random"}
GREEDY = {"obs", "rotation"}
ROTATING = {"rotation", "modegpt"}


def score(
    method: str,
    weight: Tensor,
    moments: Moments | None,
    generator: torch.Generator,
    metric: Tensor | None = None,
) -> Tensor:
    """Utility per column [in], float64. `metric`: A [out, out], for taylor."""
    w = weight.double()
    if method == "magnitude":
        return w.norm(dim=0)
    if method == "random":
        return torch.rand(w.shape[1], generator=generator, dtype=torch.float64).to(w.device)
    if moments is None:
        raise ValueError(f"score {method} needs calibration data")
    second = moments.gram.diagonal().double().clamp_min(0)
    if method == "fasp":
        return w.abs().sum(0) * second.sqrt()
    if method == "wanda_l2":
        return w.norm(dim=0) * second.sqrt()
    if method == "flap":
        variance = (second / moments.tokens - moments.mean.double() ** 2).clamp_min(0)
        return variance * w.square().sum(0)
    if method == "modegpt":
        gram = moments.gram.double()
        damping = second.mean().clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + damping * eye))
        return 1 - damping * inverse.diagonal()
    if method == "taylor":
        felt = w if metric is None else metric.double() @ w
        return (w * felt).sum(0) * second / moments.tokens
    raise ValueError(f"unknown score {method!r}; choose one of {SCORES}")


def interactions(weight: Tensor, moments: Moments, unit_of: Tensor, units: int) -> Tensor:
    """M [units, units] with ||sum_{u in P} W_u X_u||^2 = 1_P^T M 1_P for any set P of units."""
    w, owned = weight.double(), unit_of >= 0
    hessian = ((w.T @ w) * moments.gram.double())[owned][:, owned]
    at = unit_of[owned]
    rows = hessian.new_zeros(units, len(hessian)).index_add_(0, at, hessian)
    return hessian.new_zeros(units, units).index_add_(1, at, rows)


def last_masked(matrix: Tensor) -> Tensor:
    """Utility [units] = the step at which a unit goes, if each step takes the unit that adds least
    to 1_P^T M 1_P.
    """
    own, cross = matrix.diagonal().clone(), torch.zeros_like(matrix[0])
    utility = torch.zeros_like(own)
    for step in range(len(own)):
        unit = int((own + 2 * cross).argmin())
        utility[unit] = step
        own[unit] = float("inf")
        cross += matrix[unit]
    return utility
