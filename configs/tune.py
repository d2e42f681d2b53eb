"""The configuration of `skipcal tune`: a budget, and what may be tried within it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, field_validator, model_validator

from skipcal.configs.names import DAMAGE, FITTED
from skipcal.configs.run import CalibrationSettings, PositiveInt, load_settings
from skipcal.errors import asking

RULES = ("gate", "cosine", DAMAGE, "static", "static+surrogates", FITTED)
Positive = Annotated[float, Field(gt=0)]


class TuneConfig(CalibrationSettings):
    """Everything that decides the result of `skipcal tune`.

    max_kl:            KL to the full model, nats per decoded token, its interval's upper end included.
    max_perplexity_increase: perplexity over the full model's, less 1; the same.
    min_speedup:       over the full model if time were bytes read.
    requests:          that are decoded together: weights are left unread where all of them skip. Above 1 the
                       fastest within the budget is chosen by bytes, for it need not be what skips most.
    rules:             of RULES; None: all that the profile has.
    max_skips:         bounds k of the rule cosine that are tried besides the profile's own.
    warm_up_tokens:    warm-ups that are tried; None: the profile's.
    prompts:           windows of text per corpus. Not those the gate was fitted on, where they are recorded.
    prompt_tokens:     tokens of a window: the first is the prompt, all others are decoded.
    """

    _places: ClassVar[frozenset[str]] = frozenset({"output", "figure", "overwrite"})

    profile: str | None = None
    prompts: PositiveInt = 6
    prompt_tokens: Annotated[int, Field(ge=8)] = 512
    batch_size: PositiveInt = 2
    seed: Annotated[int, Field(ge=0)] = 1
    max_kl: Positive | None = None
    max_perplexity_increase: Positive | None = None
    min_speedup: Annotated[float, Field(gt=1)] | None = None
    requests: PositiveInt = 1
    rules: list[str] | None = None
    max_skips: list[PositiveInt] = Field(default_factory=lambda: [3])
    warm_up_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    figure: str | None = None

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: list[str] | None) -> list[str] | None:
        for rule in rules or []:
            if rule not in RULES:
                raise ValueError(asking(f"rule {rule!r} is not one of {', '.join(RULES)}", rule, RULES))
            if rules and rules.count(rule) > 1:
                raise ValueError(f"rule {rule!r} is asked for twice")
        return rules

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if self.max_kl is None and self.max_perplexity_increase is None and self.min_speedup is None:
            raise ValueError(
                "there is no budget; give --max-kl, --max-perplexity-increase or --min-speedup, "
                "for example --max-kl 0.05"
            )
        if self.rules is not None and "cosine" not in self.rules and "max_skips" in self.model_fields_set:
            raise ValueError("max_skips has no effect without the rule cosine; leave it out, or add the rule")
        return self


def load_tune(path: Path | None, options: dict[str, Any]) -> TuneConfig:
    """The file's settings with `options` over them; see `configs.run.load_config`."""
    return load_settings(TuneConfig, path, options)
