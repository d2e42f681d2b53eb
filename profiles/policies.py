"""From a skip ratio to a policy, by the operating points of a profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from skipcal.core.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.parts import GatePoint, GateSettings, OperatingPoint, StaticSettings

if TYPE_CHECKING:
    from skipcal.core.gate import GatePolicy
    from skipcal.profiles.data import ProfileData


def policy_for(profile: ProfileData, target_skip_ratio: float | None) -> Policy:
    """See `SkipProfile.policy_for`."""
    if isinstance(profile.policy, GateSettings):
        return gate_policy_for(profile, target_skip_ratio)
    if isinstance(profile.policy, StaticSettings):
        if target_skip_ratio is not None:
            raise TargetOutOfReach(
                f"target skip ratio {target_skip_ratio:g}: this profile's policy is a fixed set of "
                f"{len(profile.policy.layers)} FFNs; leave the ratio out, or tune again with another budget"
            )
        return static_policy(profile, profile.policy)
    return cosine_policy_for(profile, target_skip_ratio)


def cosine_policy_for(profile: ProfileData, target_skip_ratio: float | None) -> SkipPolicy:
    """See `SkipProfile.cosine_policy_for`."""
    policy = profile.cosine_policy
    if target_skip_ratio is None:
        return policy
    threshold = threshold_for(profile.operating_points, target_skip_ratio, never=FULL_MODEL_THRESHOLD)
    return replace(policy, threshold=threshold)


def gate_policy_for(profile: ProfileData, target_skip_ratio: float | None) -> GatePolicy:
    """See `SkipProfile.gate_policy`."""
    from skipcal.core.gate import NEVER, GatePolicy

    if profile.gate is None:
        raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
    if target_skip_ratio is not None:
        threshold = threshold_for(profile.gate.operating_points, target_skip_ratio, never=NEVER)
    elif isinstance(profile.policy, GateSettings):
        threshold = profile.policy.threshold
    else:
        raise ConfigError(
            "this profile's policy is not its gate, so the gate has no threshold of its own; "
            "give a target skip ratio"
        )
    # A search may have chosen another warm-up than the gate was fitted for.
    settings = profile.policy if isinstance(profile.policy, GateSettings) else profile.gate
    tensors = profile.tensors()
    return GatePolicy(
        gates=tensors.gates,
        surrogates=tensors.surrogates,
        threshold=threshold,
        warm_up_tokens=settings.warm_up_tokens,
    )


def static_policy(profile: ProfileData, settings: StaticSettings) -> Policy:
    """See `SkipProfile.static_policy`."""
    from skipcal.core.chosen_ffns import ChosenFFNs
    from skipcal.core.substituted import Substituted

    policy = ChosenFFNs(
        method="static",
        layers=tuple(settings.layers),
        probability=1.0,
        warm_up_tokens=settings.warm_up_tokens,
    )
    return Substituted(policy, profile.tensors().surrogates) if settings.surrogates else policy


def threshold_for(
    points: Sequence[OperatingPoint] | Sequence[GatePoint], target: float, *, never: float
) -> float:
    """Threshold for a skip ratio, linear between those of the two operating points around it.

    never: the threshold for a skip ratio of 0.
    """
    if not 0 <= target <= 1:
        raise ConfigError(
            f"target skip ratio {target} is not within [0, 1]; it is a fraction, not a percentage"
        )
    if target == 0:
        return never
    known = {point.target_skip_ratio: point.threshold for point in points}
    for ratio, threshold in known.items():
        if abs(ratio - target) < 1e-9:
            return threshold
    if not known or not min(known) <= target <= max(known):
        reach = f"{min(known):g} to {max(known):g}" if known else "none"
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach: this profile has operating points from {reach}; "
            "choose one within, 0 for the full model, or profile again with other regions"
        )
    below = max(ratio for ratio in known if ratio < target)
    above = min(ratio for ratio in known if ratio > target)
    weight = (target - below) / (above - below)
    return known[below] + weight * (known[above] - known[below])
