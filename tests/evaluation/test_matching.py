"""Thresholds are tuned until the realised ratio is the one asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from skipcal.errors import TargetOutOfReach
from skipcal.evaluation.matching import PASSES, TOLERANCE, match_threshold, threshold_scale
from skipcal.profiles.schema import SkipProfile

SHIPPED = SkipProfile.load("smollm2-135m-instruct")
SCALE = threshold_scale(SHIPPED.cosine_policy, SHIPPED)


def measured(shift: float, noise: float = 0.0) -> tuple[list[float], Callable[[float], float]]:
    """A text on which cosines lie `shift` higher than on the calibration's."""
    points = SHIPPED.operating_points
    ratios = [0.0, *(p.target_skip_ratio for p in points), 0.5]
    thresholds = [1.0, *(p.threshold for p in points), -1.0]
    tried: list[float] = []
    random = np.random.default_rng(0)

    def measure(threshold: float) -> float:
        tried.append(threshold)
        ratio = np.interp(-(threshold - shift), [-t for t in thresholds], ratios)
        return float(np.clip(ratio + random.normal(0, noise), 0, 0.5))

    return tried, measure


@pytest.mark.parametrize("shift", [-0.004, 0.0, 0.005])
@pytest.mark.parametrize("target", [0.05, 0.15, 0.35, 0.45])
def test_the_target_is_met_within_few_passes(shift: float, target: float) -> None:
    tried, measure = measured(shift)
    found = match_threshold(SCALE, target, measure)
    assert found.realised_skip_ratio == pytest.approx(target, abs=TOLERANCE)
    assert found.threshold in tried
    assert len(tried) <= PASSES


def test_noise_gives_the_closest_that_was_seen() -> None:
    tried, measure = measured(0.0, noise=0.05)
    found = match_threshold(SCALE, 0.2, measure)
    assert found.threshold in tried and len(tried) <= PASSES


def test_a_ratio_beyond_the_region_is_refused() -> None:
    with pytest.raises(TargetOutOfReach, match="out of reach"):
        match_threshold(SCALE, 0.9, lambda threshold: 0.0)
