"""score: the utility of each column of a consumer Y = X W^T + b; the lowest go. W [out, in], G =
X^T X [in, in].

fasp        sum_i |W_ij| ||X_j||_2                       FASP, arXiv 2501.09412
wanda_l2    ||W_:j||_2 ||X_j||_2
magnitude   ||W_:j||_2
flap        Var(X_j) ||W_:j||_2^2                        FLAP, arXiv 2312.11983
random      uniform
obs         error after the others are refitted, greedy: passes/eliminate.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from .observe import Moments

SCORES = ("fasp", "wanda_l2", "magnitude", "flap", "random", "obs")
NEEDS_DATA = {"fasp", "wanda_l2", "flap", "obs"}


def score(
    method: str, weight: Tensor, moments: Moments | None, generator: torch.Generator
) -> Tensor:
    """Utility per column [in], float64."""
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
    raise ValueError(f"unknown score {method!r}; choose one of {SCORES}")
