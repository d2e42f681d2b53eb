"""What an engine is asked to skip: settings, profile and policy, checked against its model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from skipcal.core.policy import Policy
from skipcal.errors import ConfigError, ProfileMismatch, TargetOutOfReach, UnsupportedModel
from skipcal.profiles.fits import check_shape, check_weights
from skipcal.profiles.schema import SkipProfile
from skipcal.serving.blocks import LAID_OUT, check_family
from skipcal.serving.refusals import check_engine_config
from skipcal.serving.requests import FULL, check_scores, target_asked
from skipcal.serving.settings import KEY, ServingSettings, policy_of, settings_of
from skipcal.serving.weights import served_fingerprint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The settings, the profile they name, and the policy of requests that say nothing."""

    settings: ServingSettings
    profile: SkipProfile
    policy: Policy

    def policy_at(self, target: float) -> Policy:
        """The policy of a request with a target of its own: that of an engine which was started with it.

        Raises TargetOutOfReach where there is none, and what else `policy_of` does.
        """
        if target == self.settings.target_skip_ratio:
            return self.policy
        policy = policy_of(self.settings.model_copy(update={"target_skip_ratio": target}), self.profile)
        if policy.method == "full":
            raise TargetOutOfReach(
                f"target skip ratio {target:g} is out of reach: the engine was started with the method "
                f"{self.settings.method!r}, which skips nothing"
            )
        return policy


def plan_for(vllm_config: Any) -> Plan | None:
    """What the engine is asked to skip; None: nothing was asked.

    Raises ConfigError, ProfileError, UnsupportedModel or Unavailable for what cannot be done.
    """
    settings = settings_of(vllm_config.additional_config)
    if settings is None:
        return None
    check_engine_config(vllm_config, settings)
    model = vllm_config.model_config
    check_family(model.hf_text_config.model_type, list(model.architectures))
    profile = SkipProfile.load(settings.profile)
    check_shape(profile, model.hf_text_config)
    policy = policy_of(settings, profile)
    policy.check_layers(model.hf_text_config.num_hidden_layers)
    if LAID_OUT[model.hf_text_config.model_type].experts and hasattr(policy, "surrogates"):
        raise UnsupportedModel(
            f"{policy.method} is not served for mixtures of experts, but ffn-skip and static are: "
            "checkpoints hold experts one by one, which does not tell the weights that a gate was fitted to"
        )
    return Plan(settings, profile, policy)


def check_request(plan: Plan | None, params: Any) -> None:
    """Raise ConfigError for what an engine does not serve; plan: None where it never skips."""
    target = target_asked(params)
    if plan is not None:
        check_scores(params)
    if target is None or target == FULL:
        return
    if plan is None:
        raise ConfigError(
            f"{KEY} of a request is {target:g}, but this engine was started without skipping; give it "
            f"--additional-config '{{\"{KEY}\": {{...}}}}'"
        )
    plan.policy_at(target)


def check_same_weights(plan: Plan, worker: Any) -> None:
    """Raise ProfileMismatch for other weights than those that gate or surrogates were fitted to.

    Without either, warn: thresholds may not hold. In another precision than the profile's nothing is known.
    """
    made_on = plan.profile.model
    fitted = hasattr(plan.policy, "surrogates")
    dtype = str(worker.model_config.dtype).removeprefix("torch.")
    if dtype != made_on.dtype:
        logger.warning("the profile was made in %s, the model runs in %s", made_on.dtype, dtype)
        return
    found = served_fingerprint(worker.vllm_config, worker.model_runner.get_model())
    if found is not None:
        check_weights(plan.profile, found, fitted)
    elif fitted:
        raise ProfileMismatch(
            f"the load format {worker.vllm_config.load_config.load_format} does not tell the weights that "
            "the profile's gate was fitted to; load a checkpoint as transformers saves it"
        )
