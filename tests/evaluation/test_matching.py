"""Thresholds are tuned until the realised ratio is the one asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from gated import with_gate

from skipcal.calibrate.closed_loop import BENT_PASSES, CLOSED_LOOP_TOLERANCE
from skipcal.core.substituted import Substituted
from skipcal.errors import TargetOutOfReach
from skipcal.evaluation.matching import match_threshold, threshold_scale, with_threshold
from skipcal.profiles.parts import DamageRule, OperatingPoint
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
    assert found.realised_skip_ratio == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
    assert found.threshold in tried
    assert len(tried) <= BENT_PASSES


@pytest.mark.parametrize("policy", ["cosine", "gate"])
def test_the_place_of_a_threshold_leads_back_to_it(policy: str) -> None:
    scale = SCALE if policy == "cosine" else threshold_scale(GATED.gate_policy(), GATED)
    for place in np.linspace(0, scale.end, 41).tolist():
        assert scale.place(scale.threshold(place)) == pytest.approx(place, abs=1e-9)


# Passes over all TARGETS of the search that was here before: false position, every third step a bisection.
TARGETS = (0.05, 0.1, 0.15, 0.25, 0.35, 0.45)
BEFORE = {
    "shift": {-0.01: 35, -0.006: 28, -0.004: 23, -0.002: 23, 0.0: 11, 0.002: 23, 0.005: 25, 0.01: 24},
    "power": {0.2: 43, 0.3: 36, 0.5: 23, 0.7: 23, 1.0: 6, 1.5: 21, 2.0: 25, 3.0: 28, 5.0: 27, 8.0: 39},
}


@pytest.mark.parametrize("kind", BEFORE)
def test_bent_curves_take_fewer_passes_than_bisection_now_and_then(kind: str) -> None:
    """Cosines that lie higher or lower, or ratios that are a power of the place on the scale."""
    passes = 0
    for number in BEFORE[kind]:
        tried, measure = measured(number) if kind == "shift" else bent(number)
        for target in TARGETS:
            found = match_threshold(SCALE, target, measure)
            assert found.realised_skip_ratio == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
        passes += len(tried)
    assert passes < sum(BEFORE[kind].values())


def bent(power: float) -> tuple[list[float], Callable[[float], float]]:
    tried: list[float] = []

    def measure(threshold: float) -> float:
        tried.append(threshold)
        return float(SCALE.reachable * (SCALE.place(threshold) / SCALE.end) ** power)

    return tried, measure


def test_noise_gives_the_closest_that_was_seen() -> None:
    tried, measure = measured(0.0, noise=0.05)
    found = match_threshold(SCALE, 0.2, measure)
    assert found.threshold in tried and len(tried) <= BENT_PASSES


GATED = with_gate(SHIPPED, layers=tuple(range(1, 29)))


@pytest.mark.parametrize("target", [0.02, 0.15, 0.3, 0.6])
def test_a_gates_scale_runs_from_nothing_to_all_candidates(target: float) -> None:
    scale = threshold_scale(GATED.gate_policy(), GATED)
    assert scale.thresholds == (-12.0, -2.0, -1.0, 0.5, 10.5)
    assert scale.reachable == pytest.approx(28 / 30)
    thresholds = [-12.0, -1.5, -0.5, 1.0, 10.5]  # of a text with higher scores
    realised = [0.0, 0.1, 0.2, 0.4, 28 / 30]

    def measure(threshold: float) -> float:
        return float(np.interp(threshold, thresholds, realised))

    found = match_threshold(scale, target, measure)
    assert found.realised_skip_ratio == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
    assert measure(found.threshold) == found.realised_skip_ratio


def test_thresholds_are_set_under_surrogates_too() -> None:
    policy = Substituted(SHIPPED.cosine_policy, GATED.tensors().surrogates)
    assert threshold_scale(policy, GATED) == SCALE
    moved = with_threshold(policy, 0.123)
    assert isinstance(moved, Substituted)
    assert moved.policy == replace(SHIPPED.cosine_policy, threshold=0.123)
    assert moved.threshold == 0.123 and moved.surrogates is policy.surrogates
    assert with_threshold(GATED.gate_policy(), -3.5) == replace(GATED.gate_policy(), threshold=-3.5)


def test_without_operating_points_there_is_no_scale() -> None:
    assert GATED.gate is not None
    bare = GATED.model_copy(
        update={"operating_points": [], "gate": GATED.gate.model_copy(update={"operating_points": []})}
    )
    for policy in (GATED.gate_policy(), SHIPPED.cosine_policy):
        with pytest.raises(TargetOutOfReach, match="no operating point to start from"):
            threshold_scale(policy, bare)


def test_a_ratio_beyond_the_region_is_refused() -> None:
    with pytest.raises(TargetOutOfReach, match="out of reach"):
        match_threshold(SCALE, 0.9, lambda threshold: 0.0)


def test_a_rule_by_damage_is_matched_by_its_own_points() -> None:
    policy = replace(SHIPPED.cosine_policy, tolerances=(1.0,) * 30, max_skips=1, cold_s=1, cold_e=29)
    points = [
        OperatingPoint(target_skip_ratio=at, threshold=threshold, predicted_skip_ratio=at)
        for at, threshold in ((0.1, 0.999), (0.2, 0.99))
    ]
    rule = DamageRule(excess_nll=[0.1] * 30, tokens=5, policy=policy, operating_points=points)
    scale = threshold_scale(policy, SHIPPED.model_copy(update={"damage_rule": rule}))
    assert scale.thresholds == (1.0, 0.999, 0.99, -1.0)
    assert scale.reachable == pytest.approx(14 / 30)  # every second one of the 27 after the first
