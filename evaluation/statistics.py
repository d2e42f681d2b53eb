"""Metrics as ratios of sums over items, with bootstrap intervals, paired between methods.

A mean is a ratio with denominators of 1; perplexity is the exponential of summed negative
log-likelihoods over summed tokens. Items are resampled, not tokens, for those of one item depend on
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.stats import bootstrap

Scale = Literal["mean", "exp"]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Share:
    """What one item contributes to a metric: `value` to the sum above, `weight` to the one below."""

    value: float
    weight: float = 1.0


@dataclass(frozen=True)
class Estimate:
    """A metric over `n` items with its 95 % percentile bootstrap interval; None below two items."""

    value: float
    ci_low: float | None
    ci_high: float | None
    n: int


def estimate(shares: Sequence[Share], scale: Scale = "mean", *, seed: int = 0) -> Estimate:
    """The metric over all items. Raises ValueError without any item."""
    return _bootstrapped(_sums(shares), lambda a, b: _scaled(a / b, scale), len(shares), seed)


def difference(
    mine: Sequence[Share], theirs: Sequence[Share], scale: Scale = "mean", *, seed: int = 0
) -> Estimate:
    """Metric of `mine` minus that of `theirs`, over the same items in the same order.

    Every resample draws the same items for both, so what is common to them cancels.
    """
    if len(mine) != len(theirs):
        raise ValueError(f"{len(mine)} items cannot be paired with {len(theirs)}")

    def statistic(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
        apart: np.ndarray = _scaled(a / b, scale) - _scaled(c / d, scale)
        return apart

    return _bootstrapped([*_sums(mine), *_sums(theirs)], statistic, len(mine), seed)


def _sums(shares: Sequence[Share]) -> list[np.ndarray]:
    return [np.array([s.value for s in shares], float), np.array([s.weight for s in shares], float)]


def _scaled(ratio: np.ndarray, scale: Scale) -> np.ndarray:
    scaled: np.ndarray = np.exp(ratio) if scale == "exp" else ratio
    return scaled


def _bootstrapped(
    columns: list[np.ndarray], statistic: Callable[..., np.ndarray], items: int, seed: int
) -> Estimate:
    if not items:
        raise ValueError("a metric over no items has no value")
    value = float(statistic(*(column.sum() for column in columns)))
    if items < 2:
        return Estimate(value, None, None, items)
    found = bootstrap(
        columns,
        lambda *samples, axis=-1: statistic(*(sample.sum(axis=axis) for sample in samples)),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2_000_000 // items),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, float(found.low), float(found.high), items)
