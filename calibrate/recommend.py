"""From a trace to operating points: which threshold skips how much.

A token that is armed at layer a of the region skips the FFNs after a, so with
m_j = max(cos_i, cold_s <= i < j) FFN j is skipped iff m_j >= threshold (`max_skips=None`). The
predicted ratio is a step function of the threshold that only changes at values of m: the best
threshold for a target is found by bisection over them, with or without `max_skips`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from skipcal.errors import TargetOutOfReach
from skipcal.runtime.policy import SkipPolicy

TARGET_STEP = 0.05
_SLACK = 1e-9  # ratios are quotients of counts; 0.1 + 0.2 style rounding is no reason to refuse one
CLOSED_LOOP_TOLERANCE = 0.005  # of the realised skip ratio
CLOSED_LOOP_PASSES = 6  # per operating point, at most; two or three are usual


def predicted_skip_ratio(cosine: np.ndarray, policy: SkipPolicy) -> float:
    """Skip ratio of `policy` on a clean trace, cosines [tokens, layers] past the warm-up."""
    region = cosine[:, policy.cold_s : policy.cold_e - 1]  # the last FFN of the region arms nothing
    if not region.size:
        return 0.0
    saturated = region >= np.float32(policy.threshold)
    armed_at = np.where(saturated.any(axis=1), saturated.argmax(axis=1), region.shape[1])
    skips = region.shape[1] - armed_at
    if policy.max_skips is not None:
        skips = np.minimum(skips, policy.max_skips)
    return float(skips.sum(dtype=np.int64) / cosine.size)


def predicted_threshold(cosine: np.ndarray, policy: SkipPolicy, target: float) -> float:
    """The highest threshold whose predicted skip ratio reaches `target`.

    cosine: [tokens, layers] past the warm-up. The threshold of `policy` is not looked at.
    Raises TargetOutOfReach when even skipping after every first FFN does not reach it.
    """
    region = cosine[:, policy.cold_s : policy.cold_e - 1]
    check_reachable(policy, target, cosine.shape[1])
    values = np.unique(np.maximum.accumulate(region, axis=1))[::-1]  # from never to always
    low, high = 0, len(values) - 1  # values[high] reaches the target, all tokens are armed there
    while low < high:
        middle = (low + high) // 2
        if predicted_skip_ratio(cosine, replace(policy, threshold=float(values[middle]))) >= target - 1e-12:
            high = middle
        else:
            low = middle + 1
    return float(values[high])


def check_reachable(policy: SkipPolicy, target: float, num_layers: int) -> None:
    """Raise TargetOutOfReach if no threshold skips `target` of all FFNs."""
    largest = policy.most_skips() / num_layers
    if target > largest + _SLACK:
        allowed = math.floor(1000 * largest) / 1000
        bound = "" if policy.max_skips is None else f" and max_skips {policy.max_skips}"
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach: the region [{policy.cold_s}, {policy.cold_e})"
            f"{bound} of {num_layers} layers allows {allowed:.3f} at most; lower --target-skip-ratio, "
            "or widen the region with --cold-s and --cold-e"
        )


def target_ratios(policy: SkipPolicy, num_layers: int) -> list[float]:
    """0.05, 0.10, ... up to the largest reachable ratio; that one alone if it is smaller."""
    largest = policy.most_skips() / num_layers
    steps = [round(n * TARGET_STEP, 10) for n in range(1, int(largest / TARGET_STEP + _SLACK) + 1)]
    return steps or ([largest] if largest else [])


class RealisedCurve:
    """Finds thresholds by the skip ratio they *realise*, measuring as seldom as it can.

    Skipping perturbs the stream, so a threshold realises another ratio than the clean trace
    predicts. The drift is smooth: as a function of the predicted ratio, the realised one runs from
    (0, 0) to (largest, largest), where every token is armed by the region's first FFN. Every
    measurement adds a point to that curve, for this target and for the next ones.
    """

    def __init__(
        self,
        cosine: np.ndarray,
        policy: SkipPolicy,
        measure: Callable[[SkipPolicy], float],
    ) -> None:
        """Take a clean trace [tokens, layers] past the warm-up, and a way to measure a policy."""
        self._cosine = cosine
        self._policy = policy
        self._measure = measure
        largest = policy.most_skips() / cosine.shape[1]
        self._points: list[tuple[float, float]] = [(0.0, 0.0), (largest, largest)]  # predicted, realised

    def threshold(self, target: float) -> tuple[float, float]:
        """The threshold whose realised skip ratio comes closest to `target`, and that ratio."""
        target = min(target, self._points[1][0])
        tried: list[tuple[float, float]] = []
        for _ in range(CLOSED_LOOP_PASSES):
            guess = self._predicted_for(target)
            threshold = predicted_threshold(self._cosine, self._policy, guess)
            if threshold in dict(tried):
                break  # the trace has no value in between
            policy = replace(self._policy, threshold=threshold)
            realised = self._measure(policy)
            self._points.append((predicted_skip_ratio(self._cosine, policy), realised))
            tried.append((threshold, realised))
            if abs(realised - target) <= CLOSED_LOOP_TOLERANCE:
                break
        return min(tried, key=lambda pair: abs(pair[1] - target))

    def _predicted_for(self, target: float) -> float:
        """The predicted ratio at which the points known so far put `target`."""
        below = max(point for point in self._points if point[1] <= target)
        above = min(point for point in self._points if point[1] >= target)
        if above[1] <= below[1] or above[0] <= below[0]:
            return (below[0] + above[0]) / 2
        return below[0] + (above[0] - below[0]) * (target - below[1]) / (above[1] - below[1])
