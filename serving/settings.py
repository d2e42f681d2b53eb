"""What `--additional-config '{"skipcal": {...}}'` may say, and the policy that it asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from skipcal.configs.names import DAMAGE, FITTED
from skipcal.core.policy import Policy
from skipcal.errors import ConfigError, asking
from skipcal.files.reading import shown, validation_message
from skipcal.profiles.methods import METHODS, Ask, make_policy
from skipcal.profiles.schema import SkipProfile

KEY = "skipcal"  # of vLLM's additional_config, and of a request's extra_args
SERVED = ("full", "ffn-skip", "gate", "static", "static+surrogates", FITTED, DAMAGE)


class ServingSettings(BaseModel):
    """What is skipped while a model is served.

    profile:           a file, a folder, the name of a shipped profile or a hub id, as `SkipProfile.load`.
    method:            one of SERVED; None: what the profile recommends.
    target_skip_ratio: share of FFN blocks that a token past the warm-up skips; None: as the profile says.
    warm_up_tokens:    decode steps of each request that run the full model; None: the profile's.
    prefix_caching:    "share" allows requests to read each other's keys and values, skipped ones too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    profile: str
    method: str | None = None
    target_skip_ratio: Annotated[float, Field(ge=0, le=1)] | None = None
    warm_up_tokens: Annotated[int, Field(ge=0)] | None = None
    prefix_caching: Literal["share"] | None = None


def settings_of(additional_config: Any) -> ServingSettings | None:
    """The settings under "skipcal", None where there are none. Raises ConfigError for what is not known."""
    if not isinstance(additional_config, Mapping):
        return None
    if KEY not in additional_config:
        near = next((key for key in additional_config if letters(key) == KEY), None)
        if near is not None:
            raise ConfigError(f"additional_config has a key {shown(near)}; did you mean {KEY!r}?")
        return None
    given = additional_config[KEY]
    if not isinstance(given, Mapping):
        raise ConfigError(
            f'{KEY}: expected an object such as {{"profile": "smollm2-135m-instruct"}}, got {shown(given)}'
        )
    known = list(ServingSettings.model_fields)
    for key in given:
        if key not in known:
            said = f"{KEY}: the key {shown(key)} is not known (known: {', '.join(known)})"
            raise ConfigError(asking(said, str(key), known))
    try:
        found = ServingSettings.model_validate(dict(given))
    except ValidationError as error:
        raise ConfigError(f"{KEY}: {validation_message(error, dict(given))}") from error
    check_served(found)
    return found


def check_served(settings: ServingSettings) -> None:
    """Raise ConfigError for a method that is not served, or settings that do not go together."""
    method = settings.method
    if method is None:
        if settings.warm_up_tokens is not None:
            raise ConfigError(f"{KEY}: warm_up_tokens goes with a method; name one of {', '.join(SERVED)}")
        return
    if method in SERVED:
        return
    if method in METHODS:
        raise ConfigError(f"{KEY}: method {method!r} is not served; those that are: {', '.join(SERVED)}")
    said = f"{KEY}: method {shown(method)} is not known (served: {', '.join(SERVED)})"
    raise ConfigError(asking(said, method, SERVED))


def policy_of(settings: ServingSettings, profile: SkipProfile) -> Policy:
    """The policy that the settings ask of `profile`. Raises as `make_policy` does."""
    if settings.method is None:
        return profile.policy_for(settings.target_skip_ratio)
    ask = Ask(
        target_skip_ratio=settings.target_skip_ratio,
        new_tokens=0,  # which no method that is served asks for
        warm_up_tokens=settings.warm_up_tokens,
    )
    return make_policy(settings.method, profile, ask)


def letters(key: Any) -> str:
    """A key as people may mean it: lower case, without what stands between words."""
    return "".join(c for c in str(key).lower() if c.isalnum())
