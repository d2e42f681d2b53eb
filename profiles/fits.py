"""Whether a profile was made for a model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from skipcal.errors import ProfileMismatch
from skipcal.files.reading import printable
from skipcal.profiles.parts import GateSettings, ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skipcal.profiles.data import ProfileData

logger = logging.getLogger(__name__)


def check_fits(profile: ProfileData, model: PreTrainedModel, *, same_weights: bool | None = None) -> None:
    """Raise ProfileMismatch if `model` has another shape; warn if it has other weights.

    same_weights: raise for other weights too; None: where the policy is a gate, which was fitted to them.
    """
    from skipcal.arch.loading import fingerprint
    from skipcal.arch.locate import unwrap
    from skipcal.arch.quantization import quantization_name

    made_on = profile.model
    check_shape(profile, model.config.get_text_config())
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != made_on.dtype:
        logger.warning("the profile was made in %s, the model runs in %s", made_on.dtype, dtype)
    _warn_of_other_form(made_on, quantization_name(unwrap(model)), bool(getattr(model, "peft_config", None)))
    revision = getattr(model.config, "_commit_hash", None)
    if revision and made_on.revision and revision != made_on.revision:
        logger.warning("the profile was made on revision %s, this is %s", made_on.revision, revision)
    if dtype == made_on.dtype:
        check_weights(
            profile, fingerprint(model), _holds_tensors(profile) if same_weights is None else same_weights
        )


def check_shape(profile: ProfileData, config: Any) -> None:
    """Raise ProfileMismatch for a model of another shape; config: that of its text."""
    made_on = profile.model
    asked = {
        "model type": (made_on.model_type, config.model_type),
        "number of layers": (made_on.num_layers, config.num_hidden_layers),
        "hidden size": (made_on.hidden_size, config.hidden_size),
    }
    different = [
        f"{what} {mine!r}, the model's is {its!r}" for what, (mine, its) in asked.items() if mine != its
    ]
    if different:
        raise ProfileMismatch(
            f"the profile was made for {made_on.name}: {'; '.join(different)}; "
            f"give that model with --model {made_on.name}, or make one for this: skipcal profile"
        )


def check_weights(profile: ProfileData, found: str, same_weights: bool) -> None:
    """Warn of other weights than the profile's, which have the fingerprint `found`, or raise ProfileMismatch.

    same_weights: raise.
    """
    if found == profile.model.fingerprint:
        return
    if same_weights:
        raise ProfileMismatch(
            f"the profile was made on other weights of {profile.model.name}, and a gate holds for the "
            "weights it was fitted to; profile these with: skipcal profile, then: skipcal fit"
        )
    logger.warning(
        "the profile was made on other weights of %s: thresholds may not hold",
        profile.model.name,
    )


def warn_of_other_opening(profile: ProfileData, tokenizer: Any) -> None:
    """Warn where the profile's texts began otherwise than those that are measured by this tokenizer."""
    from skipcal.text.opening import opening_names

    if profile.calibration.chat_template:
        return  # they began as the template does
    now = opening_names(tokenizer)
    corpora = profile.calibration.corpora
    if now and any(corpus.opening is None for corpus in corpora):
        logger.warning(
            "the profile does not say how its texts began: windows of running text lacked the %s that texts "
            "begin with here, so ratios may not hold; make it anew with: skipcal profile",
            _tokens(now),
        )
    others = [c.opening for c in corpora if c.opening is not None and c.opening != now]
    if others:
        logger.warning(
            "the profile's texts began with %s, texts begin with %s here: ratios may not hold",
            _tokens(others[0]),
            _tokens(now),
        )


def _tokens(opening: list[str]) -> str:
    return printable(" ".join(opening)) or "no special token"


def _warn_of_other_form(made_on: ModelInfo, quantization: str | None, adapted: bool) -> None:
    """Warn where the weights of the profile and the model's were quantized or adapted in other ways."""
    if quantization != made_on.quantization:
        logger.warning(
            "the profile was made with quantization %s, the model has %s: thresholds may not hold",
            made_on.quantization or "none",
            quantization or "none",
        )
    if adapted != (made_on.adapter is not None):
        logger.warning(
            "the profile was made %s, the model %s: thresholds may not hold",
            f"with the adapter {made_on.adapter}" if made_on.adapter else "without an adapter",
            "has one" if adapted else "has none",
        )


def _holds_tensors(profile: ProfileData) -> bool:
    """Whether the policy needs tensors that were fitted to the model's weights."""
    return isinstance(profile.policy, GateSettings) or bool(getattr(profile.policy, "surrogates", False))
