"""Fit the surrogate of an FFN block: a reduced-rank ridge regression of f on the stream's direction.

Reduced-rank regression (Izenman 1975, with a ridge penalty): of all maps of rank r the one that
comes closest to the targets, in the least squares of the ridge, is the ridge solution projected on
the r leading directions of what it predicts.
"""

from __future__ import annotations

import torch

from skipcal.core.surrogates import LowRank
from skipcal.fit.moments import Moments, penalised, ridge

PENALTY = 1e-3  # relative to each input's variance; 1e-3 and 3e-3 differ by 0.001 of the variance left


def fit_low_rank(moments: Moments, rank: int, *, penalty: float = PENALTY) -> LowRank:
    """The map of `rank` from moments of u [hidden] and f [hidden], in float32."""
    full = ridge(moments, penalty)
    covariance, _ = moments.covariances()
    predicted = full.coefficients.T @ penalised(covariance, penalty) @ full.coefficients
    directions = torch.linalg.eigh(predicted).eigenvectors.flip(-1)[:, :rank]  # [hidden, rank]
    x, y = moments.means()
    down = (full.coefficients @ directions).T
    bias = y - directions @ (down @ x)
    return LowRank(down=down.float().contiguous(), up=directions.float().contiguous(), bias=bias.float())


def unexplained(moments: Moments, surrogate: LowRank) -> float:
    """Share of the variance of f that the map leaves, over the weighted tokens; 1 is a constant."""
    b = (surrogate.up.double() @ surrogate.down.double()).T  # [hidden, hidden], x @ b
    covariance, cross = moments.covariances()
    explained = 2 * (b * cross).sum() - (b * (covariance @ b)).sum()
    total = moments.variance().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(1 - explained / total)
