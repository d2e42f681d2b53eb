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

from skipcal.calibrate.closed_loop import RealisedCurve
from skipcal.errors import TargetOutOfReach
from skipcal.runtime.policy import SkipPolicy

TARGET_STEP = 0.05
_SLACK = 1e-9  # ratios are quotients of counts; 0.1 + 0.2 style rounding is no reason to refuse one


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


def cosine_curve(
    cosine: np.ndarray, policy: SkipPolicy, measure: Callable[[SkipPolicy], float]
) -> RealisedCurve:
    """Realised ratios of the rule `cosine`, from a clean trace [tokens, layers] past the warm-up.

    The largest ratio is realised as predicted: every token is armed by the region's first FFN.
    """
    return RealisedCurve(
        largest=policy.most_skips() / cosine.shape[1],
        threshold_at=lambda ratio: predicted_threshold(cosine, policy, ratio),
        predicted_at=lambda threshold: predicted_skip_ratio(cosine, replace(policy, threshold=threshold)),
        measure=lambda threshold: measure(replace(policy, threshold=threshold)),
    )
