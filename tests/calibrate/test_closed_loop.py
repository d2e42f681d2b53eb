"""Thresholds by the ratio they realise: met within a few measurements, however the prediction is off."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from skipcal.calibrate.closed_loop import (
    BENT_PASSES,
    CLOSED_LOOP_PASSES,
    CLOSED_LOOP_TOLERANCE,
    RealisedCurve,
    middle_first,
)

LARGEST = 0.9


def curve(realised: Callable[[float], float]) -> tuple[RealisedCurve, list[tuple[float, float]]]:
    """Thresholds that are the predicted ratios times ten; `realised` is of the predicted ratio."""
    measured: list[tuple[float, float]] = []

    def measure(threshold: float) -> float:
        measured.append((threshold, realised(threshold / 10)))
        return measured[-1][1]

    return RealisedCurve(LARGEST, lambda ratio: 10 * ratio, lambda t: t / 10, measure), measured


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_a_smooth_drift_is_met_within_the_tolerance(power: float) -> None:
    """Realised too much, as predicted, too little."""
    found, measured = curve(lambda ratio: LARGEST * (ratio / LARGEST) ** power)
    for target in (0.05, 0.25, 0.5, 0.8):
        begin = len(measured)
        threshold, realised = found.threshold(target)
        assert (threshold, realised) in measured[begin:]
        assert realised == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
        assert len(measured) - begin <= CLOSED_LOOP_PASSES


@pytest.mark.parametrize("power", [0.2, 0.3, 5.0, 8.0])
def test_a_sharp_bend_is_met_too_though_false_position_alone_creeps(power: float) -> None:
    for target in (0.1, 0.25, 0.5, 0.8):
        found, measured = curve(lambda ratio: LARGEST * (ratio / LARGEST) ** power)
        found.bends = True
        assert found.threshold(target)[1] == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
        assert len(measured) <= BENT_PASSES


def test_what_was_measured_for_one_target_helps_the_next() -> None:
    found, measured = curve(lambda ratio: LARGEST * (ratio / LARGEST) ** 1.7)
    found.threshold(0.4)
    first = len(measured)
    found.threshold(0.42)
    assert len(measured) - first == 1


def test_a_ratio_that_jumps_over_the_target_gives_the_closest_measured() -> None:
    """Few tokens: below a predicted 0.3 nothing is skipped, from there on a half."""
    found, measured = curve(lambda ratio: 0.5 if ratio >= 0.3 else 0.1 * ratio)
    threshold, realised = found.threshold(0.4)
    assert len(measured) > 1
    assert (threshold, realised) == min(measured, key=lambda pair: abs(pair[1] - 0.4))
    assert realised == 0.5
    assert len(measured) <= CLOSED_LOOP_PASSES


def test_targets_beyond_the_largest_ratio_are_taken_for_it() -> None:
    found, _ = curve(lambda ratio: ratio)
    assert found.threshold(1.0) == pytest.approx((9.0, LARGEST))


@pytest.mark.parametrize("count", [0, 1, 2, 7, 10])
def test_middle_first_is_all_targets_the_middle_of_what_is_left_before_its_ends(count: int) -> None:
    targets = [0.05 * n for n in range(1, count + 1)]
    ordered = middle_first(targets)
    assert sorted(ordered) == targets
    # Of each the nearest known on either side, an end of the range at first, are as far away, to one place.
    for place, target in enumerate(ordered):
        at = targets.index(target)
        known = [targets.index(before) for before in ordered[:place]]
        below = max((n for n in known if n < at), default=-1)
        above = min((n for n in known if n > at), default=count)
        assert abs((above - at) - (at - below)) <= 1


def test_middle_first_takes_fewer_measurements_of_a_bent_curve() -> None:
    """Small ratios realise less than predicted."""

    def measurements(targets: list[float]) -> int:
        found, measured = curve(lambda ratio: LARGEST * (ratio / LARGEST) ** 1.7)
        for target in targets:
            assert found.threshold(target)[1] == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
        return len(measured)

    targets = [0.05 * n for n in range(1, 18)]
    assert measurements(middle_first(targets)) < measurements(targets)
