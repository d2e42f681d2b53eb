"""Fit the surrogate of an FFN block: a reduced-rank ridge regression of f on the stream's direction.

Reduced-rank regression (Izenman 1975, with a ridge penalty): of all maps of rank r the one that
comes closest to the targets, in the least squares of the ridge, is the ridge solution projected on
the r leading directions of what it predicts. Which r are leading depends on what an error costs: by a
metric, the same is done to the targets that it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from skipcal.core.surrogates import LowRank, RoutedLowRank, Surrogate
from skipcal.fit.moments import Linear, Moments, penalised, ridge

PENALTY = 1e-3  # relative to each input's variance; 1e-3 and 3e-3 differ by 0.001 of the variance left
PULL = 0.2  # of one of several maps towards the map of all tokens, in the same measure
ROUNDS = 12  # of Lloyd's iteration
SAMPLE = 16_384  # tokens that it looks at

# Batches of directions u [n, hidden], what is to be added [n, hidden], and weights [n]: all of them anew.
Samples: TypeAlias = Callable[[], Iterator[tuple[Tensor, Tensor, Tensor]]]


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


def fit_surrogate(
    samples: Samples, hidden: int, *, rank: int, maps: int, metric: Tensor | None, device: torch.device
) -> Surrogate:
    """A surrogate of `maps` maps from directions, targets and weights, which `samples` gives anew each time.

    Of several a token's map is that of the center its direction is nearest to. They share `down` with the
    one map of all tokens; each is a ridge regression on its own tokens, drawn towards that one.
    """
    moments, tokens = Moments.empty(hidden, hidden, device), 0
    for u, target, w in samples():
        moments.add(u, target, w)
        tokens += len(u)
    one = fit_low_rank(moments, rank, metric=metric)
    if maps == 1:
        return one
    centers = k_means(samples, maps, tokens=tokens)
    own = [Moments.empty(rank, hidden, device) for _ in centers]
    for u, target, w in samples():
        z, chosen = u @ one.down.T, nearest(u, centers)
        for k, part in enumerate(own):
            here = chosen == k
            part.add(z[here], target[here], w[here])
    return fit_routed(one, centers, own)


def fit_routed(one: LowRank, centers: Tensor, moments: Sequence[Moments]) -> RoutedLowRank:
    """Maps from moments of `one.down` u [rank] and targets [hidden] of the tokens of each of the centers."""
    towards = Linear(one.up.double().T, one.bias.double())
    maps = [ridge(own, PENALTY, towards=towards, pull=PULL) for own in moments]
    return RoutedLowRank(
        down=torch.cat([one.down, centers]).contiguous(),
        up=torch.stack([own.coefficients.T.float() for own in maps]).contiguous(),
        bias=torch.stack([own.intercept.float() for own in maps]),
        route_bias=-0.5 * centers.square().sum(-1),
    )


def nearest(u: Tensor, centers: Tensor) -> Tensor:
    """Number of the nearest of `centers` [maps, hidden] to each of u [tokens, hidden]: [tokens] int64."""
    return (u @ centers.T - 0.5 * centers.square().sum(-1)).argmax(-1)


def k_means(samples: Samples, count: int, *, tokens: int, seed: int = 0) -> Tensor:
    """Centers [count, hidden] of directions by Lloyd's iteration, weighted, over about SAMPLE of `tokens`.

    They begin at tokens drawn by weight, and are rounded as they are stored, so that a token belongs to the
    same in a fit and in use.
    """
    step, seen, some = max(1, tokens // SAMPLE), 0, []
    for each, _, weights in samples():
        own = slice(-seen % step, None, step)  # every step-th of all, wherever batches end
        some.append((each[own], weights[own]))
        seen += len(each)
    u, w = (torch.cat(parts) for parts in zip(*some, strict=True))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(w.double().cpu(), min(count, len(w)), generator=generator)
    centers = u[drawn.to(u.device)]
    for _ in range(ROUNDS):
        belongs = torch.nn.functional.one_hot(nearest(u, centers), len(centers)) * w[:, None]
        weight = belongs.sum(0)[:, None]  # a center that nobody is nearest to stays
        centers = torch.where(weight > 0, (belongs.T @ u) / weight.clamp_min(1e-30), centers)
    return centers.to(torch.bfloat16).float()
