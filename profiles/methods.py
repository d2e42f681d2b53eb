"""Every method by its name, asked for by the share of blocks it is to skip.

FFN-choosing methods take the ratio over FFN blocks, whole-layer methods over layers. Both are
shares of L per token after the warm-up, so methods are compared at equal ratio; reports state the
share of weight bytes beside it, for a layer is more than its FFN.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np

from skipcal.configs.names import DAMAGE
from skipcal.configs.names import FITTED as FITTED
from skipcal.configs.names import METHODS as METHODS
from skipcal.configs.names import SURROGATES as SURROGATES
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.whole_layers import ShortGPT, SkipDecode
from skipcal.errors import ConfigError, TargetOutOfReach, suggestion
from skipcal.profiles.parts import StaticSettings
from skipcal.profiles.policies import whole_number
from skipcal.profiles.schema import SkipProfile


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a method is asked for.

    target_skip_ratio: share of blocks to skip per token; `full` ignores it. None: ffn-skip and gate take
                       what their profile recommends, the others what that is meant to skip.
    warm_up_tokens:    decode steps by the full model; None: the profile's. Whole-layer methods have
                       no warm-up.
    new_tokens:        the most tokens a row will get: skipdecode spreads its schedule over them.
    seed:              of random choices.
    """

    target_skip_ratio: float | None
    new_tokens: int
    warm_up_tokens: int | None = None
    seed: int = 0


def check_method(method: str) -> None:
    """Raise ConfigError for an unknown name."""
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; {suggestion(method, METHODS)}")


def make_policy(method: str, profile: SkipProfile, ask: Ask) -> Policy:
    """The policy of `method` that skips `ask.target_skip_ratio` of all blocks, or comes closest.

    Static sets hold whole layers, so they come as close as a whole number can, ties to fewer.
    Raises ConfigError for an unknown method, or one that needs surrogates the profile does not have,
    TargetOutOfReach for a ratio it cannot reach.
    """
    check_method(method)
    if method.endswith(SURROGATES):
        plain = make_policy(method.removesuffix(SURROGATES), profile, ask)
        assert isinstance(plain, SkipPolicy | ChosenFFNs)
        return Substituted(plain, profile.tensors().surrogates)
    warm_up = profile.policy.warm_up_tokens if ask.warm_up_tokens is None else ask.warm_up_tokens
    if method == "full":
        return SkipPolicy(cold_s=0, cold_e=0, threshold=FULL_MODEL_THRESHOLD, warm_up_tokens=warm_up)
    if method == "gate":
        return replace(profile.gate_policy(ask.target_skip_ratio), warm_up_tokens=warm_up)
    if method == "ffn-skip":
        return replace(profile.cosine_policy_for(ask.target_skip_ratio), warm_up_tokens=warm_up)
    target = recommended_ratio(profile) if ask.target_skip_ratio is None else ask.target_skip_ratio
    if method == FITTED:
        return profile.fitted_policy(target, warm_up)
    if method == DAMAGE:
        return replace(profile.damage_policy(target), warm_up_tokens=warm_up)
    if not 0 < target <= 1:
        raise ConfigError(f"target skip ratio {target:g} for {method}: expected a fraction within (0, 1]")
    layers = profile.model.num_layers
    if method == "random":
        return ChosenFFNs(
            method="random",
            layers=tuple(range(layers)),
            probability=target,
            warm_up_tokens=warm_up,
            seed=ask.seed,
        )
    if method == "no-input-adaptive":
        region = tuple(range(profile.cosine_policy.cold_s, profile.cosine_policy.cold_e))
        check_ratio(method, target, len(region) / layers)
        return ChosenFFNs(
            method="no-input-adaptive",
            layers=region,
            probability=min(1.0, target * layers / len(region)),
            warm_up_tokens=warm_up,
            seed=ask.seed,
        )
    if method == "static":
        cosine = np.asarray(profile.layers["pooled"].mean)
        chosen = largest(cosine, nearest_count(method, target, layers))
        return ChosenFFNs(method="static", layers=chosen, probability=1.0, warm_up_tokens=warm_up)
    if method == "shortgpt":
        influence = np.asarray(block_influence(profile))
        return ShortGPT(removed=largest(-influence, nearest_count(method, target, layers)))
    return skipdecode_for(target, layers, ask.new_tokens - 1)


def recommended_ratio(profile: SkipProfile) -> float:
    """Target skip ratio of the operating point that the profile's policy is at."""
    if isinstance(profile.policy, StaticSettings):
        return len(profile.policy.layers) / profile.model.num_layers
    at, points = profile.policy.threshold, profile.points_of_policy
    if not points:
        raise TargetOutOfReach("the profile has no operating point; give --target-skip-ratio")
    return min(points, key=lambda point: abs(point.threshold - at)).target_skip_ratio


def block_influence(profile: SkipProfile) -> list[float]:
    """Block Influence by layer, as the calibration measured it (arXiv 2403.03853, equation 1)."""
    found = profile.layers["pooled"].block_influence
    if found is None:
        raise ConfigError(
            "shortgpt needs Block Influence, which this profile lacks; make it again with: skipcal profile"
        )
    return found


@functools.cache  # a search over some thousand schedules, asked for again by every plan
def skipdecode_for(target: float, layers: int, steps: int, warm_up_layers: int = 1) -> SkipDecode:
    """The schedule from all layers downwards whose mean over `steps` skips `target` of them.

    Where even the steepest schedule skips less, its start is lowered too.
    """
    floor = warm_up_layers + 1
    check_ratio("skipdecode", target, 1 - floor / layers)
    if steps < 1:
        raise ConfigError("skipdecode needs 2 new tokens or more, for the first comes from the prefill")

    def schedule(min_layers: float, max_layers: float) -> SkipDecode:
        return SkipDecode(
            num_layers=layers,
            max_layers=max_layers,
            min_layers=min_layers,
            steps=steps,
            warm_up_layers=warm_up_layers,
        )

    steepest = schedule(floor, layers)
    if steepest.mean_skip_ratio() >= target:
        candidates = [schedule(low, layers) for low in np.linspace(floor, layers, 40 * layers)]
    else:
        candidates = [schedule(floor, high) for high in np.linspace(floor, layers, 40 * layers)]
    return min(candidates, key=lambda each: abs(each.mean_skip_ratio() - target))


def nearest_count(method: str, target: float, layers: int) -> int:
    """The number of layers closest to `target` of them, ties to fewer; at least one."""
    check_ratio(method, target, (layers - 1) / layers)
    return whole_number(target, layers)


def largest(values: np.ndarray, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest values, ascending; among equals the lower index."""
    order = np.argsort(-values, kind="stable")
    return tuple(sorted(int(index) for index in order[:count]))


def check_ratio(method: str, target: float, reachable: float) -> None:
    """Raise TargetOutOfReach for a ratio beyond `reachable`."""
    if target > reachable + 1e-9:
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach for {method}, which can skip {reachable:.3f} at "
            "most; lower --target-skip-ratio"
        )
