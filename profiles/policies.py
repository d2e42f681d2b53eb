"""From a profile to a policy: what it recommends, or what its operating points say of another skip ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from skipcal.core.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy
from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.data import ProfileData
from skipcal.profiles.parts import GatePoint, GateSettings, OperatingPoint, StaticSettings

if TYPE_CHECKING:
    from skipcal.core.gate import GatePolicy


class ProfilePolicies(ProfileData):
    """The policies of a profile."""

    def policy_for(self, target_skip_ratio: float | None = None) -> Policy:
        """The recommended policy, or the one of the same rule for another skip ratio.

        Ratios between two operating points get the threshold between theirs; 0 is the full model.
        Raises TargetOutOfReach beyond the last point and below the first; for a gate also Unavailable,
        ProfileError and ProfileMismatch when its tensors are missing or are others.
        """
        if isinstance(self.policy, GateSettings):
            return self.gate_policy(target_skip_ratio)
        if isinstance(self.policy, StaticSettings):
            if target_skip_ratio is not None and self.policy.surrogates == "fitted":
                return self.fitted_policy(target_skip_ratio, self.policy.warm_up_tokens)
            if target_skip_ratio is not None:
                raise TargetOutOfReach(
                    f"target skip ratio {target_skip_ratio:g}: this profile's policy is a fixed set of "
                    f"{len(self.policy.layers)} FFNs; leave the ratio out, or tune again with another budget"
                )
            return self.static_policy(self.policy)
        if self.policy.tolerances is None:
            return self.cosine_policy_for(target_skip_ratio)
        if target_skip_ratio is None:
            return self.policy
        # A search may have chosen another warm-up than the profile's.
        damage = self.damage_policy(target_skip_ratio)
        return replace(damage, warm_up_tokens=self.policy.warm_up_tokens)

    def cosine_policy_for(self, target_skip_ratio: float | None = None) -> SkipPolicy:
        """The paper's rule at a skip ratio; see `policy_for`."""
        policy = self.cosine_policy
        if target_skip_ratio is None:
            return policy
        threshold = threshold_for(self.operating_points, target_skip_ratio, never=FULL_MODEL_THRESHOLD)
        return replace(policy, threshold=threshold)

    def damage_policy(self, target_skip_ratio: float) -> SkipPolicy:
        """The rule with layers weighed by damage at a skip ratio; see `policy_for`.

        Raises ConfigError if the profile has none.
        """
        if self.damage_rule is None:
            raise ConfigError(
                "this profile has not measured what each FFN loses; make it again with: "
                "skipcal profile --by-damage"
            )
        points = self.damage_rule.operating_points
        threshold = threshold_for(points, target_skip_ratio, never=FULL_MODEL_THRESHOLD)
        return replace(self.damage_rule.policy, threshold=threshold)

    def gate_policy(self, target_skip_ratio: float | None = None) -> GatePolicy:
        """The rule `gate` at a skip ratio; see `policy_for`. Raises ConfigError if there is no gate."""
        from skipcal.core.gate import NEVER, GatePolicy

        if self.gate is None:
            raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
        if target_skip_ratio is not None:
            threshold = threshold_for(self.gate.operating_points, target_skip_ratio, never=NEVER)
        elif isinstance(self.policy, GateSettings):
            threshold = self.policy.threshold
        else:
            raise ConfigError(
                "this profile's policy is not its gate, so the gate has no threshold of its own; "
                "give a target skip ratio"
            )
        # A search may have chosen another warm-up than the gate was fitted for.
        settings = self.policy if isinstance(self.policy, GateSettings) else self.gate
        tensors = self.tensors()
        return GatePolicy(
            gates=tensors.gates,
            surrogates=tensors.surrogates,
            threshold=threshold,
            warm_up_tokens=settings.warm_up_tokens,
        )

    def static_policy(self, settings: StaticSettings) -> Policy:
        """A fixed set of FFNs, with surrogates for them or without; see `gate_policy` for errors."""
        from skipcal.core.chosen_ffns import ChosenFFNs
        from skipcal.core.substituted import Substituted

        policy = ChosenFFNs(
            method="static",
            layers=tuple(settings.layers),
            probability=1.0,
            warm_up_tokens=settings.warm_up_tokens,
        )
        if not settings.surrogates:
            return policy
        if settings.surrogates == "fitted":
            place = [each.layers for each in self.fitted_sets().sets].index(settings.layers)
            return Substituted(policy, self.set_tensors().sets[place], "fitted")
        return Substituted(policy, self.tensors().surrogates)

    def fitted_policy(self, target_skip_ratio: float, warm_up_tokens: int) -> Policy:
        """The fitted set of as many FFNs as come closest to `target_skip_ratio`.

        Raises TargetOutOfReach where no set has so many, ConfigError if there are no sets; for their tensors
        see `gate_policy`.
        """
        from skipcal.core.policy import FULL_MODEL_THRESHOLD

        if target_skip_ratio == 0:
            return replace(self.cosine_policy, threshold=FULL_MODEL_THRESHOLD, warm_up_tokens=warm_up_tokens)
        sets = self.fitted_sets().sets
        count = whole_number(target_skip_ratio, self.model.num_layers)
        for each in sets:
            if len(each.layers) == count:
                return self.static_policy(
                    StaticSettings(layers=each.layers, warm_up_tokens=warm_up_tokens, surrogates="fitted")
                )
        known = ", ".join(f"{each.target_skip_ratio:g}" for each in sets)
        raise TargetOutOfReach(
            f"target skip ratio {target_skip_ratio:g}: this profile has sets fitted for {known}; give one of "
            "these, or fit another with: skipcal fit --method static --target-skip-ratio"
        )


def whole_number(target: float, layers: int) -> int:
    """The number of layers closest to `target` of them, ties to fewer; at least one."""
    return max(1, math.ceil(target * layers - 0.5 - 1e-9))


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
