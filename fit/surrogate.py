"""Fit the surrogate of an FFN block: a reduced-rank ridge regression of f on the stream's direction.

Reduced-rank regression (Izenman 1975, with a ridge penalty): of all maps of rank r the one that
comes closest to the targets, in the least squares of the ridge, is the ridge solution projected on
the r leading directions of what it predicts. Which r are leading depends on what an error costs: by a
metric, the same is done to the targets that it measures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.core.surrogates import LowRank
from skipcal.fit.moments import Moments, penalised, ridge

PENALTY = 1e-3  # relative to each input's variance; 1e-3 and 3e-3 differ by 0.001 of the variance left


def fit_low_rank(
    moments: Moments, rank: int, *, metric: Tensor | None = None, penalty: float = PENALTY
) -> LowRank:
    """The map of `rank` from moments of u [hidden] and f [hidden], in float32.

    metric: G, [hidden, hidden], positive definite: the map comes closest by deltaT G delta; None: by
    |delta|^2. With R = G^(1/2) that is the same regression of R f, which gives R times the map.
    """
    full = ridge(moments, penalty)
    covariance, _ = moments.covariances()
    predicted = full.coefficients.T @ penalised(covariance, penalty) @ full.coefficients
    root, inverse = (None, None) if metric is None else _roots(metric.to(predicted))
    if root is not None:
        predicted = root @ predicted @ root
    directions = torch.linalg.eigh(predicted).eigenvectors.flip(-1)[:, :rank]  # [hidden, rank]
    x, y = moments.means()
    down = (full.coefficients @ (directions if root is None else root @ directions)).T
    up = directions if inverse is None else inverse @ directions
    bias = y - up @ (down @ x)
    return LowRank(down=down.float().contiguous(), up=up.float().contiguous(), bias=bias.float())


def _roots(metric: Tensor) -> tuple[Tensor, Tensor]:
    """G^(1/2) and its inverse."""
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(1e-12 * values.max())
    return (vectors * values.sqrt()) @ vectors.T, (vectors * values.rsqrt()) @ vectors.T


def unexplained(moments: Moments, surrogate: LowRank) -> float:
    """Share of the variance of f that the map leaves, over the weighted tokens; 1 is a constant."""
    b = (surrogate.up.double() @ surrogate.down.double()).T  # [hidden, hidden], x @ b
    covariance, cross = moments.covariances()
    explained = 2 * (b * cross).sum() - (b * (covariance @ b)).sum()
    total = moments.variance().sum().clamp_min(torch.finfo(torch.float64).tiny)
    return float(1 - explained / total)
