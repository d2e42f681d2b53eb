"""Tune the threshold of ffn-skip until the ratio it realises on a task is the one asked for.

A threshold realises another ratio on every kind of text, so a profile's threshold for 0.25 may
skip 0.15 of one task and 0.35 of another. Methods can only be compared at equal ratio when it is
tuned on the task itself; only ratios are looked at, never a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from skipcal.calibrate.recommend import check_reachable
from skipcal.errors import TargetOutOfReach
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.policy import SkipPolicy

TOLERANCE = 0.005
PASSES = 8  # per target, at most


@dataclass(frozen=True)
class Match:
    """A threshold and the skip ratio it realised on the items it was tuned on."""

    threshold: float
    realised_skip_ratio: float


def match_threshold(
    profile: SkipProfile,
    policy: SkipPolicy,
    target: float,
    measure: Callable[[SkipPolicy], float],
) -> Match:
    """The threshold whose realised ratio comes closest to `target`.

    The search runs along the profile's operating points: their thresholds, from the highest down to
    one below all, are the scale on which the realised ratio is nearly linear. `policy` gives region,
    warm-up and bound of skips. Raises TargetOutOfReach for a ratio beyond the region.
    """
    check_reachable(policy, target, profile.model.num_layers)
    scale = _Scale(profile)
    low, high = (0.0, 0.0), (scale.end, policy.most_skips() / profile.model.num_layers)
    tried: list[Match] = []
    for attempt in range(PASSES):
        share = (target - low[1]) / (high[1] - low[1]) if high[1] > low[1] else 0.5
        # Kept off the ends, and a bisection every third time: interpolation alone can creep.
        share = 0.5 if attempt % 3 == 2 else min(max(share, 0.1), 0.9)
        place = low[0] + (high[0] - low[0]) * share
        threshold = scale.threshold(place)
        realised = measure(replace(policy, threshold=threshold))
        tried.append(Match(threshold, realised))
        if abs(realised - target) <= TOLERANCE:
            break
        if realised < target:
            low = (place, realised)
        else:
            high = (place, realised)
    return min(tried, key=lambda match: abs(match.realised_skip_ratio - target))


class _Scale:
    """Thresholds by place: place k is that of the k-th operating point, 0 is above every cosine."""

    def __init__(self, profile: SkipProfile) -> None:
        points = sorted(profile.operating_points, key=lambda point: point.target_skip_ratio)
        if not points:
            raise TargetOutOfReach("the profile has no operating point to start from; profile again")
        self._thresholds = [1.0, *(point.threshold for point in points), -1.0]
        self.end = float(len(self._thresholds) - 1)

    def threshold(self, place: float) -> float:
        below = min(int(place), len(self._thresholds) - 2)
        weight = place - below
        return (1 - weight) * self._thresholds[below] + weight * self._thresholds[below + 1]
