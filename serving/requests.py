"""What a request may say of skipping: `extra_args={"skipcal": X}`, or `vllm_xargs` over HTTP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from skipcal.errors import ConfigError
from skipcal.files.reading import shown
from skipcal.serving.settings import KEY, letters

FULL = 0.0  # of a request's target skip ratio: the full model
_EXPECTED = (
    "expected a target skip ratio between 0 and 1, 0 for the full model, or the whole number 1 for what the "
    "engine was started with"
)


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
    asks = getattr(sampling_params, "prompt_logprobs", None) is not None
    if asks and target_asked(sampling_params) != FULL:
        raise ConfigError(
            f"prompt_logprobs of a request that skips would be the full model's; ask for them with {KEY}: 0, "
            "and measure a policy by: skipcal evaluate"
        )


def target_asked(sampling_params: Any) -> float | None:
    """The target skip ratio of a request; FULL: the full model; None: what the engine was started with.

    A request that says nothing says None. Raises ConfigError for what is not known; what a profile can reach
    is not looked at.
    """
    extra = getattr(sampling_params, "extra_args", None) or {}
    _check_keys([key for key in extra if key != KEY], f'{{"{KEY}": 0.25}}')
    asked = extra.get(KEY, 1)
    if isinstance(asked, int) and asked in (0, 1):  # False and True are
        return None if asked else FULL
    if isinstance(asked, float) and 0 <= asked < 1:
        return asked
    raise ConfigError(f"{KEY} of a request is {shown(asked)}; {_EXPECTED}")


def check_body(unknown: Iterable[str]) -> None:
    """Raise ConfigError where the fields that vLLM does not know, and passes over, are meant for skipping."""
    _check_keys(unknown, f'"vllm_xargs": {{"{KEY}": 0.25}}')


def _check_keys(keys: Iterable[str], meant: str) -> None:
    for key in keys:
        if letters(key).startswith(KEY) or letters(key) == "targetskipratio":
            raise ConfigError(f"the key {shown(key)} of a request is not known there; did you mean {meant}?")
