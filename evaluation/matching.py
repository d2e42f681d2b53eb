"""Tune a threshold until the ratio it realises on a task is the one asked for.

A threshold realises another ratio on every kind of text, so a profile's threshold for 0.25 may
skip 0.15 of one task and 0.35 of another. Methods can only be compared at equal ratio when it is
tuned on the task itself; only ratios are looked at, never a score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from skipcal.calibrate.closed_loop import RealisedCurve
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.errors import TargetOutOfReach
from skipcal.profiles.schema import SkipProfile

BEYOND = 10.0  # log damages so far outside a gate's operating points that nothing or all skips


@dataclass(frozen=True)
class Match:
    """A threshold and the skip ratio it realised on the items it was tuned on."""

    threshold: float
    realised_skip_ratio: float


@dataclass(frozen=True)
class ThresholdScale:
    """Thresholds by place, from one that skips nothing to one that skips all that can be skipped.

    In between are the profile's operating points: by their places the realised ratio is nearly linear.
    reachable: the skip ratio at the end.
    """

    thresholds: tuple[float, ...]
    reachable: float

    @property
    def end(self) -> float:
        """The last place."""
        return float(len(self.thresholds) - 1)

    def threshold(self, place: float) -> float:
        """The threshold at a place, linear between two."""
        below = min(int(place), len(self.thresholds) - 2)
        weight = place - below
        return (1 - weight) * self.thresholds[below] + weight * self.thresholds[below + 1]

    def place(self, threshold: float) -> float:
        """The place of a threshold."""
        sign = 1 if self.thresholds[0] < self.thresholds[-1] else -1
        return float(np.interp(sign * threshold, sign * np.array(self.thresholds), np.arange(self.end + 1)))


def threshold_scale(policy: Policy, profile: SkipProfile) -> ThresholdScale:
    """The scale of a policy with a threshold. Raises TargetOutOfReach without operating points."""
    layers = profile.model.num_layers
    if isinstance(policy, Substituted):
        return threshold_scale(policy.policy, profile)
    if isinstance(policy, GatePolicy):
        assert profile.gate is not None
        inner = sorted(point.threshold for point in profile.gate.operating_points)
        if not inner:
            raise TargetOutOfReach("the gate has no operating point to start from; fit it again")
        thresholds = (inner[0] - BEYOND, *inner, inner[-1] + BEYOND)
        return ThresholdScale(thresholds, len(policy.gates.layers) / layers)
    assert isinstance(policy, SkipPolicy)
    known = profile.operating_points
    if policy.tolerances is not None:
        assert profile.damage_rule is not None
        known = profile.damage_rule.operating_points
    points = sorted(known, key=lambda point: point.target_skip_ratio)
    if not points:
        raise TargetOutOfReach("the profile has no operating point to start from; profile again")
    thresholds = (1.0, *(point.threshold for point in points), -1.0)
    return ThresholdScale(thresholds, policy.most_skips() / layers)


def with_threshold(policy: Policy, threshold: float) -> Policy:
    """The same policy at another threshold."""
    if isinstance(policy, Substituted):
        inner = with_threshold(policy.policy, threshold)
        assert isinstance(inner, SkipPolicy)
        return replace(policy, policy=inner)
    assert isinstance(policy, SkipPolicy | GatePolicy)
    return replace(policy, threshold=threshold)


def match_threshold(scale: ThresholdScale, target: float, measure: Callable[[float], float]) -> Match:
    """The threshold whose realised ratio comes closest to `target`.

    Places of the scale are what is predicted. Raises TargetOutOfReach for a ratio beyond it.
    """
    if target > scale.reachable + 1e-9:
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach: {scale.reachable:.3f} is the largest there is; "
            "lower --target-skip-ratio, or use a profile with a wider region"
        )
    curve = RealisedCurve(
        largest=scale.reachable,
        threshold_at=lambda ratio: scale.threshold(scale.end * ratio / scale.reachable),
        predicted_at=lambda threshold: scale.reachable * scale.place(threshold) / scale.end,
        measure=measure,
        bends=True,
    )
    return Match(*curve.threshold(target))
