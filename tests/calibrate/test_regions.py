"""Cold regions against a brute-force fit with scipy's isotonic regression."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import isotonic_regression

from skipcal.calibrate.regions import check_region, find_regions, fit_regions
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


@pytest.mark.parametrize(("layers", "curves"), [(3, 25), (4, 25), (7, 25), (16, 8), (30, 3)])
def test_the_best_split_is_found(layers: int, curves: int) -> None:
    for seed in range(curves):
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


def test_a_split_that_differs_by_rounding_alone_is_no_better_one() -> None:
    """0.1 + 0.2 against 0.3: the last digit would decide for the narrower region."""
    curve = np.array([0.9, 0.3, 0.1 + 0.2, 0.3, 0.1 + 0.2, 0.3, 0.9 - 0.3, 0.5])
    even = np.array([0.9, 0.3, 0.3, 0.3, 0.3, 0.3, 0.6, 0.5])
    assert fit_regions(curve).cold_s == fit_regions(even).cold_s == 1
    assert fit_regions(curve).cold_e == fit_regions(even).cold_e == 7


def test_what_is_equal_is_told_on_the_curves_own_scale() -> None:
    """Cosines that differ by a millionth are still differences, and so are their splits."""
    curve = np.random.default_rng(3).random(12)
    fine = fit_regions(0.97 + 1e-7 * curve)
    plain = fit_regions(curve)
    assert (fine.cold_s, fine.cold_e) == (plain.cold_s, plain.cold_e)
    assert fine.r2 == pytest.approx(plain.r2, abs=1e-6)


def test_a_curve_in_float32_is_fitted_in_float64() -> None:
    curve = (0.97 + 1e-3 * np.random.default_rng(3).random(30)).astype(np.float32)
    assert fit_regions(curve) == fit_regions(curve.astype(np.float64))


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


@pytest.mark.parametrize(("noise", "seed"), [(0.05, 0), (0.05, 3), (0.2, 2), (0.2, 3)])
def test_intervals_are_percentiles_over_prompts_drawn_again(noise: float, seed: int) -> None:
    """A naive bootstrap with the same draws: a mean curve for each, fitted by itself."""
    falling, rising = np.linspace(0.9, 0.7, 6), np.linspace(0.7, 0.9, 14)
    curve = np.concatenate([falling, rising, np.linspace(0.9, 0.75, 6)])
    sums, counts = sums_of(curve, 12, noise)
    fits = []
    for draw in np.random.default_rng(seed).multinomial(12, [1 / 12] * 12, size=200):
        drawn = [prompt for prompt in range(12) for _ in range(draw[prompt])]
        fit = fit_regions(sum(sums[p] for p in drawn) / sum(counts[p] for p in drawn))
        fits.append((fit.cold_s, fit.cold_e))
    found = find_regions(curve, sums, counts, seed=seed)
    for interval, values in zip(
        (found.cold_s_interval, found.cold_e_interval), zip(*fits, strict=True), strict=True
    ):
        ascending = sorted(values)
        assert interval == (ascending[round(0.025 * 199)], ascending[round(0.975 * 199)])
    fit = fit_regions(curve)
    assert (found.method, found.cold_s, found.cold_e) == ("isotonic", fit.cold_s, fit.cold_e)
    assert found.fit_r2 == fit.r2


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


def middle(*values: float) -> list[str]:
    """What is said of a curve whose region, all but its ends, has these values."""
    curve = np.array([0.1, *values, 0.1])
    return find_regions(curve, *sums_of(curve, 3, 0.0), seed=0, given=(1, len(curve) - 1)).warnings


def test_a_middle_of_two_layers_or_of_one_value_cannot_be_told() -> None:
    for values in ((0.5, 0.6), (0.5, 0.5, 0.5)):
        (warning,) = middle(*values)
        end = len(values) + 1
        assert warning.startswith(
            f"the middle of the curve does not rise: [1, {end}) cannot be told, expected 0.8 or more. "
        )
    assert middle(0.5, 0.6, 0.7) == []


def test_a_middle_rises_from_a_rho_of_08_on() -> None:
    assert middle(0.5, 0.6, 0.8, 0.7) == []  # rho 0.8
    assert middle(5, 3, 2, 1, 4, 0, 6, 7, 8, 9, 10, 11) == []  # 0.797, which is shown as 0.80
    (warning,) = middle(0.7, 0.5, 0.6, 0.8, 0.75)
    assert "[1, 6) has Spearman's rho 0.60, expected 0.8 or more. Early cosines" in warning
    assert warning.endswith("random skipping at the same ratio before trusting this policy")


def narrow(layers: int, width: int) -> list[str]:
    """What is said of a region of so many layers among as many that rise."""
    curve = np.linspace(0.5, 0.9, layers)
    return find_regions(curve, *sums_of(curve, 3, 0.0), seed=0, given=(2, 2 + width)).warnings


def test_a_region_is_narrow_below_a_quarter_of_the_layers() -> None:
    assert narrow(16, 4) == []
    (warning,) = narrow(16, 3)
    assert warning == (
        "the skippable region [2, 5) holds 3 of 16 layers: at most 0.12 of the FFNs can be skipped. "
        "To try a wider one, give --cold-s and --cold-e"
    )
    assert "holds 1 of 16 layers: at most 0.00 of" in narrow(16, 1)[1]


def test_a_narrow_region_is_named() -> None:
    curve = np.concatenate([np.linspace(0.99, 0.5, 10), [0.6, 0.7], np.linspace(0.65, 0.1, 8)])
    found = find_regions(curve, *sums_of(curve, 5, 0.0), seed=0)
    assert any("at most 0.10" in warning for warning in found.warnings)


def test_given_regions_are_kept_and_checked() -> None:
    curve = np.linspace(0.8, 0.99, 10)
    found = find_regions(curve, *sums_of(curve, 5, 0.0), seed=0, given=(2, 6))
    assert (found.cold_s, found.cold_e, found.method, found.fit_r2) == (2, 6, "given", None)
    assert (found.cold_s_interval, found.cold_e_interval) == (None, None)
    assert found.monotonicity == 1.0
    with pytest.raises(ConfigError, match="expected 1 <= cold_s < cold_e <= 9"):
        find_regions(curve, *sums_of(curve, 5, 0.0), seed=0, given=(2, 10))


@pytest.mark.parametrize("region", [(1, 9), (1, 2), (8, 9)])
def test_the_first_and_the_last_layer_alone_may_be_cold(region: tuple[int, int]) -> None:
    check_region(*region, 10)


@pytest.mark.parametrize("region", [(0, 5), (1, 10), (5, 5), (6, 5), (-1, 3)])
def test_other_regions_are_none(region: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=f"cold_s {region[0]} and cold_e {region[1]} are no region of 10"):
        check_region(*region, 10)
