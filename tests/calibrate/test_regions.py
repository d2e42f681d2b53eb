"""Cold regions against a brute-force fit with scipy's isotonic regression."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from skipcal.calibrate.regions import find_regions, fit_regions
from skipcal.errors import ConfigError, UnsupportedModel

# Mean cosines of SmolLM2-135M-Instruct on the embedded text: a model without a rising middle.
SMOLLM2 = np.array(
    [
        *(0.076, 0.967, 0.972, 0.979, 0.972, 0.971, 0.973, 0.970, 0.968, 0.973),
        *(0.972, 0.976, 0.977, 0.978, 0.977, 0.978, 0.981, 0.979, 0.965, 0.971),
        *(0.953, 0.976, 0.964, 0.967, 0.980, 0.987, 0.982, 0.977, 0.970, 0.750),
    ]
)


def brute_force(curve: np.ndarray) -> tuple[float, int, int]:
    def error(part: np.ndarray, increasing: bool) -> float:
        if not len(part):
            return 0.0
        return float(((isotonic_regression(part, increasing=increasing).x - part) ** 2).sum())

    layers = len(curve)
    splits = []
    for s in range(1, layers - 1):
        for e in range(s + 1, layers):
            total = error(curve[:s], False) + error(curve[s:e], True) + error(curve[e:], False)
            splits.append((round(total, 12), -(e - s), s, e))
    total, _, s, e = min(splits)
    return total, s, e


@pytest.mark.parametrize("seed", range(25))
@pytest.mark.parametrize("layers", [3, 4, 7, 16, 30])
def test_the_best_split_is_found(seed: int, layers: int) -> None:
    curve = np.random.default_rng(seed).random(layers)
    error, cold_s, cold_e = brute_force(curve)
    fit = fit_regions(curve)
    assert (fit.cold_s, fit.cold_e) == (cold_s, cold_e)
    assert fit.r2 == pytest.approx(1 - error / ((curve - curve.mean()) ** 2).sum())


def test_a_textbook_curve_is_split_where_it_turns() -> None:
    curve = np.concatenate([[0.9, 0.8, 0.7], np.linspace(0.75, 0.99, 20), [0.8, 0.6]])
    fit = fit_regions(curve)
    # cold_s 3 and 2 fit exactly alike (0.7 begins the rise as well); the wider region wins
    assert (fit.cold_s, fit.cold_e) == (2, 23)
    assert fit.r2 == pytest.approx(1.0)


def test_among_equal_fits_the_widest_then_the_first_wins() -> None:
    assert fit_regions(np.arange(6.0)).cold_s == 1
    assert fit_regions(np.arange(6.0)).cold_e == 5
    flat = fit_regions(np.ones(5))
    assert (flat.cold_s, flat.cold_e, flat.r2) == (1, 4, None)


def test_fewer_than_three_layers_have_no_region() -> None:
    with pytest.raises(UnsupportedModel, match="2 layers"):
        fit_regions(np.ones(2))


def sums_of(curve: np.ndarray, prompts: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    counts = rng.integers(50, 100, prompts).astype(float)
    return (curve + rng.normal(0, noise, (prompts, len(curve)))) * counts[:, None], counts


def test_the_bootstrap_is_tight_without_noise_and_wide_with_it() -> None:
    curve = np.concatenate([[0.5], np.linspace(0.8, 0.99, 12), [0.9, 0.7, 0.6]])
    quiet = find_regions(curve, *sums_of(curve, 20, 0.0), seed=0)
    assert quiet.cold_s_interval == (1, 1)
    assert quiet.cold_e_interval == (13, 13)
    loud = find_regions(curve, *sums_of(curve, 20, 0.2), seed=0)
    assert loud.cold_e_interval is not None
    assert loud.cold_e_interval[0] < loud.cold_e_interval[1]
    assert find_regions(curve, *sums_of(curve, 20, 0.2), seed=0) == loud


def test_a_rising_middle_brings_no_warning_and_a_flat_one_says_what_to_do() -> None:
    curve = np.concatenate([[0.5], np.linspace(0.8, 0.99, 12), [0.9, 0.7, 0.6]])
    good = find_regions(curve, *sums_of(curve, 5, 0.0), seed=0)
    assert good.monotonicity == pytest.approx(1.0)
    assert good.warnings == []
    bad = find_regions(SMOLLM2, *sums_of(SMOLLM2, 5, 0.0), seed=0)
    assert (bad.cold_s, bad.cold_e) == (1, 26)
    assert bad.monotonicity == pytest.approx(0.12, abs=0.02)
    assert "does not rise" in bad.warnings[0]
    assert "max_skips" in bad.warnings[0]


def test_a_narrow_region_is_named() -> None:
    curve = np.concatenate([np.linspace(0.99, 0.5, 10), [0.6, 0.7], np.linspace(0.65, 0.1, 8)])
    found = find_regions(curve, *sums_of(curve, 5, 0.0), seed=0)
    assert any("at most 0.10" in warning for warning in found.warnings)


def test_given_regions_are_kept_and_checked() -> None:
    curve = np.linspace(0.8, 0.99, 10)
    found = find_regions(curve, *sums_of(curve, 5, 0.0), seed=0, given=(2, 6))
    assert (found.cold_s, found.cold_e, found.method, found.fit_r2) == (2, 6, "given", None)
    with pytest.raises(ConfigError, match="expected 1 <= cold_s < cold_e <= 9"):
        find_regions(curve, *sums_of(curve, 5, 0.0), seed=0, given=(2, 10))
