"""Estimates against naive sums, intervals against theory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from skipcal.evaluation.statistics import Share, difference, estimate


def test_a_mean_and_its_interval() -> None:
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    found = estimate([Share(v) for v in values])
    assert found.value == pytest.approx(values.mean())
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.ci_low == pytest.approx(values.mean() - half, abs=0.2 * half)
    assert found.ci_high == pytest.approx(values.mean() + half, abs=0.2 * half)
    assert found.n == 400


def test_perplexity_weighs_tokens_not_windows() -> None:
    shares = [Share(10.0, 5), Share(90.0, 30), Share(3.0, 1)]
    assert estimate(shares, "exp").value == pytest.approx(math.exp(103 / 36))


def test_the_paired_interval_is_narrower_than_the_items_scatter() -> None:
    """What items have in common cancels: a constant gain has an interval of no width."""
    items = np.random.default_rng(0).normal(0.0, 10.0, 50)
    found = difference([Share(v + 0.25) for v in items], [Share(v) for v in items])
    assert found.value == pytest.approx(0.25)
    assert found.ci_low == pytest.approx(0.25) and found.ci_high == pytest.approx(0.25)


def test_a_difference_of_perplexities() -> None:
    mine, theirs = [Share(10.0, 5), Share(12.0, 5)], [Share(9.0, 5), Share(9.5, 5)]
    assert difference(mine, theirs, "exp").value == pytest.approx(math.exp(2.2) - math.exp(1.85))


def test_one_item_has_no_interval_and_none_no_value() -> None:
    found = estimate([Share(2.0)])
    assert (found.value, found.ci_low, found.ci_high) == (2.0, None, None)
    with pytest.raises(ValueError, match="no items"):
        estimate([])
    with pytest.raises(ValueError, match="cannot be paired"):
        difference([Share(1.0)], [])


def test_the_seed_decides() -> None:
    shares = [Share(v) for v in np.random.default_rng(1).random(30)]
    assert estimate(shares, seed=5) == estimate(shares, seed=5)
    assert estimate(shares, seed=5) != estimate(shares, seed=6)
