"""Thresholds and predicted ratios against running the rule token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from skipcal.calibrate.closed_loop import CLOSED_LOOP_PASSES, CLOSED_LOOP_TOLERANCE
from skipcal.calibrate.recommend import (
    LastCosinePrediction,
    Prediction,
    arming_layers,
    check_reachable,
    cosine_curve,
    in_memory,
    predicted_skip_ratio,
    predicted_threshold,
    target_ratios,
)
from skipcal.calibrate.running_maxima import RunningMaxima
from skipcal.core.policy import SkipPolicy
from skipcal.errors import TargetOutOfReach


def naive_ratio(cosine: np.ndarray, policy: SkipPolicy) -> float:
    skipped = 0
    for token in cosine:
        armed, count = False, 0
        for layer, value in enumerate(token):
            inside = policy.cold_s <= layer < policy.cold_e
            if inside and armed and (policy.max_skips is None or count < policy.max_skips):
                count += 1
            elif inside and not armed and value >= np.float32(policy.threshold):
                armed = True
        skipped += count
    return skipped / cosine.size


def clean(tokens: int = 200, layers: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((tokens, layers)).astype(np.float32)


POLICIES = [
    SkipPolicy(cold_s=s, cold_e=e, threshold=0.5, max_skips=k)
    for s, e in [(1, 11), (3, 8), (5, 6), (4, 4), (0, 12)]
    for k in [None, 1, 3]
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 0.6, 0.93, 1.5])
def test_the_predicted_ratio_is_that_of_the_rule(policy: SkipPolicy, threshold: float) -> None:
    policy = replace(policy, threshold=threshold)
    expected = pytest.approx(naive_ratio(clean(), policy), abs=1e-12)
    assert predicted_skip_ratio(clean(), policy) == expected
    assert in_memory(clean(), policy).skip_ratio(threshold) == expected


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_threshold_is_the_highest_that_reaches_the_target(policy: SkipPolicy, share: float) -> None:
    cosine = clean()
    target = share * policy.most_skips() / 12
    if target == 0:
        pytest.skip("a region of one layer or none skips nothing")
    threshold = predicted_threshold(cosine, policy, target)
    assert naive_ratio(cosine, replace(policy, threshold=threshold)) >= target - 1e-12
    higher = cosine[cosine > threshold]
    if higher.size:
        next_higher = float(higher.min())
        assert naive_ratio(cosine, replace(policy, threshold=next_higher)) < target


def test_without_a_bound_the_threshold_is_a_quantile_of_the_running_maxima() -> None:
    cosine = clean(tokens=500)
    policy = SkipPolicy(cold_s=2, cold_e=10, threshold=0.0)
    maxima = np.sort(np.maximum.accumulate(cosine[:, 2:9], axis=1).ravel())[::-1]
    needed = int(np.ceil(0.3 * cosine.size))
    assert predicted_threshold(cosine, policy, 0.3) == float(maxima[needed - 1])


@pytest.mark.parametrize("last", [None, 1, 3])
def test_ranks_among_running_maxima_are_those_of_the_sorted_values(last: int | None) -> None:
    """Negative cosines, both zeros, equal values, blocks of unlike sizes and of none."""
    rng = np.random.default_rng(0)
    whole = np.round(rng.uniform(-1, 1, (5, 300)), 2).astype(np.float32)
    whole[:, 7], whole[:, 8] = 0.0, -0.0
    whole[2, 100:] += rng.uniform(-1e-6, 1e-6, 200).astype(np.float32)
    maxima = RunningMaxima(lambda: np.split(whole, [1, 1, 90, 250], axis=1), last)
    values = [max(whole[: j + 1, token]) for token in range(300) for j in range(5)[-(last or 5) :]]
    values.sort(reverse=True)
    assert len(maxima) == len(values)
    assert [maxima.largest(rank) for rank in range(1, len(values) + 1)] == values
    for threshold in [-2.0, -0.5, -0.0, 0.0, 0.3, float(values[40]), 1.0, 1.5]:
        assert maxima.at_least(threshold) == sum(value >= np.float32(threshold) for value in values)


def test_reach_and_targets() -> None:
    policy = SkipPolicy(cold_s=2, cold_e=10, threshold=0.9)
    assert target_ratios(policy, 30) == [0.05, 0.1, 0.15, 0.2]  # 7 / 30 = 0.233
    assert target_ratios(replace(policy, max_skips=3), 30) == [0.05, 0.1]
    assert target_ratios(replace(policy, max_skips=1), 30) == [1 / 30]
    assert target_ratios(replace(policy, cold_e=2), 30) == []
    check_reachable(policy, 7 / 30, 30)
    with pytest.raises(TargetOutOfReach, match=r"allows 0\.233 at most"):
        check_reachable(policy, 0.25, 30)
    with pytest.raises(TargetOutOfReach, match=r"allows 0\.266 at most"):  # 0.2666...: never rounded up
        check_reachable(replace(policy, cold_e=11), 0.267, 30)
    with pytest.raises(TargetOutOfReach, match="max_skips 3"):
        check_reachable(replace(policy, max_skips=3), 0.2, 30)


def test_the_loop_closes_on_a_drift_with_few_measurements() -> None:
    """Skipping lowers later cosines: the same threshold realises less than the clean trace predicts."""
    cosine = clean(tokens=4000)
    policy = SkipPolicy(cold_s=1, cold_e=11, threshold=0.0)
    calls = []

    def drifting(tried: SkipPolicy) -> float:
        calls.append(tried.threshold)
        return predicted_skip_ratio(cosine * np.float32(0.97), tried)

    curve = cosine_curve(in_memory(cosine, policy), drifting)
    targets = target_ratios(policy, 12)
    for target in targets[:-1]:
        threshold, realised = curve.threshold(target)
        assert realised == pytest.approx(target, abs=CLOSED_LOOP_TOLERANCE)
        assert (
            predicted_skip_ratio(cosine * np.float32(0.97), replace(policy, threshold=threshold)) == realised
        )
    assert len(calls) <= 3 * len(targets)


def test_the_largest_ratio_is_reached_though_its_digits_round_up() -> None:
    policy = SkipPolicy(cold_s=1, cold_e=10, threshold=0.0)
    cosine = clean(layers=30)
    curve = cosine_curve(in_memory(cosine, policy), lambda tried: predicted_skip_ratio(cosine, tried))
    assert curve.threshold(0.2666666667)[1] == pytest.approx(8 / 30)


def test_the_loop_ends_where_no_threshold_meets_the_target() -> None:
    """A measurement that jumps over the target: the nearer side is taken, in bounded time."""
    cosine = clean()
    policy = SkipPolicy(cold_s=1, cold_e=11, threshold=0.0)
    calls = []

    def jumping(tried: SkipPolicy) -> float:
        calls.append(tried.threshold)
        return 0.1 if tried.threshold > 0.9 else 0.6

    threshold, realised = cosine_curve(in_memory(cosine, policy), jumping).threshold(0.3)
    assert realised == 0.1
    assert threshold > 0.9
    assert len(calls) <= CLOSED_LOOP_PASSES


@pytest.mark.parametrize("max_skips", [None, 2])
def test_a_trace_in_blocks_predicts_what_the_whole_predicts(max_skips: int | None) -> None:
    """Every token counts, of whichever block it is, and every threshold to the last bit."""
    cosine = clean(tokens=90)
    policy = SkipPolicy(cold_s=2, cold_e=9, threshold=0.0, max_skips=max_skips)
    layers = arming_layers(policy)
    cut = Prediction(lambda: [part[:, layers].T for part in np.split(cosine, [20, 70])], policy, 12)
    assert cut.tokens == 90
    assert (cut.policy, cut.num_layers) == (policy, 12)
    for value in cosine[:, layers].ravel()[::7]:
        for threshold in (value, np.nextafter(value, np.float32(2)), np.nextafter(value, np.float32(-2))):
            expected = naive_ratio(cosine, replace(policy, threshold=float(threshold)))
            assert cut.skip_ratio(float(threshold)) == pytest.approx(expected, abs=1e-12)


def test_the_smallest_targets_take_the_largest_value() -> None:
    cosine = clean()
    cosine[3, 9] = 1.0  # the largest, and at the last layer that arms: a maximum of one FFN alone
    policy = SkipPolicy(cold_s=1, cold_e=11, threshold=0.0)
    for skips in (0, 1):
        assert predicted_threshold(cosine, policy, skips / cosine.size) == 1.0
    assert predicted_threshold(cosine, policy, 2 / cosine.size) < 1.0


@pytest.mark.parametrize("last", [2, 3, 4, 9])
def test_at_most_the_last_so_many_maxima_of_a_token_count(last: int) -> None:
    block = clean(tokens=40)[:, :3].T
    values = np.maximum.accumulate(block)[max(3 - last, 0) :].ravel()
    maxima = RunningMaxima(lambda: [block], last)
    assert [maxima.largest(rank) for rank in range(1, len(values) + 1)] == sorted(values, reverse=True)


def test_what_is_out_of_reach_is_told_to_three_digits_and_no_more() -> None:
    policy = SkipPolicy(cold_s=0, cold_e=30, threshold=0.9)
    with pytest.raises(TargetOutOfReach) as refused:
        check_reachable(policy, 0.98, 30)
    assert str(refused.value).startswith(
        "target skip ratio 0.98 is out of reach: the region [0, 30) of 30 layers allows 0.966 at most; "
    )


def test_the_largest_ratio_of_a_curve_is_a_share_of_the_layers() -> None:
    policy = SkipPolicy(cold_s=1, cold_e=10, threshold=0.0)
    curve = cosine_curve(in_memory(clean(layers=30), policy), lambda tried: 0.0)
    assert curve.largest == 8 / 30


def naive_ratio_with_tolerances(cosine: np.ndarray, policy: SkipPolicy) -> float:
    assert policy.tolerances is not None
    skipped = 0
    for token in cosine:
        last, row = -np.inf, 0
        for layer in range(policy.cold_s, policy.cold_e):
            reach = np.float32(1 - (1 - policy.threshold) * policy.tolerances[layer])
            if last >= reach and (policy.max_skips is None or row < policy.max_skips):
                skipped, row = skipped + 1, row + 1
            else:
                last, row = token[layer], 0
    return skipped / cosine.size


def last_cosine(cosine: np.ndarray, policy: SkipPolicy) -> LastCosinePrediction:
    halves = np.array_split(cosine[:, arming_layers(policy)].T, 2, axis=1)
    return LastCosinePrediction(lambda: halves, policy, cosine.shape[1])


WITH_TOLERANCES = [
    replace(policy, tolerances=tuple(1 + layer % 3 / 2 for layer in range(12)))
    for policy in POLICIES
    if policy.cold_s < policy.cold_e
]


@pytest.mark.parametrize("policy", WITH_TOLERANCES)
@pytest.mark.parametrize("threshold", [-1.0, 0.1, 0.6, 0.93, 1.5])
def test_the_predicted_ratio_with_tolerances_is_that_of_the_rule(
    policy: SkipPolicy, threshold: float
) -> None:
    expected = naive_ratio_with_tolerances(clean(), replace(policy, threshold=threshold))
    assert last_cosine(clean(), policy).skip_ratio(threshold) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("policy", [p for p in WITH_TOLERANCES if p.cold_e - p.cold_s > 2])
def test_a_threshold_with_tolerances_just_reaches_its_target(policy: SkipPolicy) -> None:
    found = last_cosine(clean(), policy)
    for target in target_ratios(policy, 12):
        assert target - 1e-9 <= found.skip_ratio(found.threshold(target)) < target + 0.01
    assert found.skip_ratio(-1.0) == pytest.approx(policy.most_skips() / 12)
    with pytest.raises(TargetOutOfReach):
        found.threshold(policy.most_skips() / 12 + 0.01)
