"""The configuration of `skipcal tune`: a budget, and what may be tried within it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from skipcal.configs.run import (
    DEFAULT_CORPORA,
    PositiveInt,
    given_options,
    read_yaml,
    validated,
    without_folder,
)

RULES = ("gate", "cosine", "static", "static+surrogates")
Positive = Annotated[float, Field(gt=0)]


class TuneConfig(BaseModel):
    """Everything that decides the result of `skipcal tune`.

    max_kl:            KL to the full model, nats per decoded token, its interval's upper end included.
    max_perplexity_increase: perplexity over the full model's, less 1; the same.
    min_speedup:       over the full model if time were bytes read, batch 1.
    rules:             of gate, cosine, static, static+surrogates; None: all that the profile has.
    max_skips:         bounds k of the rule cosine that are tried besides the profile's own.
    warm_up_tokens:    warm-ups that are tried; None: the profile's.
    prompts:           windows of text per corpus. Not those the gate was fitted on, where they are recorded.
    prompt_tokens:     tokens of a window: the first is the prompt, all others are decoded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    profile: str | None = None
    model: str | None = None
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    device: str | None = None
    device_map: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    corpus: list[str] = []
    data_files: list[str] = []
    text_column: str = "text"
    prompts: PositiveInt = 6
    prompt_tokens: Annotated[int, Field(ge=8)] = 512
    batch_size: PositiveInt = 2
    seed: Annotated[int, Field(ge=0)] = 1
    max_kl: Positive | None = None
    max_perplexity_increase: Positive | None = None
    min_speedup: Annotated[float, Field(gt=1)] | None = None
    rules: list[str] | None = None
    max_skips: list[PositiveInt] = [3]
    warm_up_tokens: list[Annotated[int, Field(ge=0)]] | None = None
    output: str | None = None
    figure: str | None = None
    overwrite: bool = False

    @field_validator("rules")
    @classmethod
    def _known(cls, rules: list[str] | None) -> list[str] | None:
        unknown = [rule for rule in rules or [] if rule not in RULES]
        if unknown:
            raise ValueError(f"rule {unknown[0]!r} is not one of {', '.join(RULES)}")
        return rules

    @model_validator(mode="after")
    def _a_budget(self) -> Self:
        if self.max_kl is None and self.max_perplexity_increase is None and self.min_speedup is None:
            raise ValueError(
                "there is no budget; give --max-kl, --max-perplexity-increase or --min-speedup, "
                "for example --max-kl 0.05"
            )
        return self

    def corpora(self) -> list[str]:
        """Names of the corpora to use, with the defaults filled in."""
        if self.corpus or self.data_files:
            return self.corpus
        return DEFAULT_CORPORA if self.model else ["embedded"]

    def recorded(self) -> dict[str, Any]:
        """What a profile keeps of it: all that decides numbers, no places on this computer."""
        kept = self.model_dump(mode="json", exclude={"output", "figure", "overwrite"})
        kept["corpus"] = self.corpora()
        kept["data_files"] = [without_folder(entry) for entry in self.data_files]
        for name in ("model", "profile"):
            if kept[name] is not None and Path(kept[name]).exists():
                kept[name] = Path(kept[name]).name
        return kept


def load_tune(path: Path | None, options: dict[str, Any]) -> TuneConfig:
    """The file's settings with `options` over them; see `configs.run.load_config`."""
    settings = read_yaml(path) if path else {}
    given = given_options(options)
    return validated(TuneConfig, {**settings, **given}, given, path)
