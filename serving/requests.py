"""What a request may say of skipping: `extra_args={"skipcal": 0}`, or `vllm_xargs` over HTTP."""

from __future__ import annotations

from typing import Any

from skipcal.errors import ConfigError
from skipcal.files.reading import shown
from skipcal.serving.settings import KEY


def check_no_beams(params: Any) -> None:
    """Raise ConfigError for a beam search, which asks for every token by a prompt of its own.

    No token of it would ever be past the warm-up, so that it would silently get the full model.
    """
    if type(params).__name__ == "BeamSearchParams":
        raise ConfigError(f"{KEY} does not go with beam search, whose beams are new prompts at every token")


def check_scores(sampling_params: Any) -> None:
    """Raise ConfigError for a request that asks for its prompt's scores and wants skipping.

    A prompt runs the full model, so that these scores would be the full model's: whoever measures a text by
    them would find that skipping costs nothing.
    """
    if getattr(sampling_params, "prompt_logprobs", None) is not None and wants_skipping(sampling_params):
        raise ConfigError(
            f"prompt_logprobs of a request that skips would be the full model's; ask for them with {KEY}: 0, "
            "and measure a policy by: skipcal evaluate"
        )


def wants_skipping(sampling_params: Any) -> bool:
    """Whether the request wants it; one that says nothing does. Raises ConfigError for any but 0 and 1."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    asked = extra.get(KEY, 1)
    if isinstance(asked, int) and asked in (0, 1):  # False and True are
        return bool(asked)
    raise ConfigError(f"{KEY} of a request is {shown(asked)}; expected 0 for the full model, or 1")
