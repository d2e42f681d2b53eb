"""What `skipcal bench` can be asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from skipcal.configs.run import EngineName, PositiveInt, load_settings, without_places

Ratio = Annotated[float, Field(gt=0, le=1)]
_LEAST_NEW_TOKENS = 3  # the first comes from the prefill; of one step alone there is no median


class BenchConfig(BaseModel):
    """Everything that decides a measurement of speed.

    model, shape:   one of them; neither is the model of the profile, or else the embedded one. A shape has
                    random weights.
    dtype:          "auto" is a model's own; for a shape bfloat16 on a GPU, else float32.
    rule:           "cosine", or "gate": the profile's with its surrogates, for a shape random ones. By
                    default "gate" with a profile, else "cosine".
    ratios:         skip ratios to force.
    context_tokens: tokens in the cache when decoding begins: the length of the prompt.
    peers:          also measure other ways to run the full model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str | None = None
    shape: str | None = None
    profile: str | None = None
    rule: Literal["cosine", "gate"] | None = None
    revision: str | None = None
    adapter: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    quantization: str | None = None
    device: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    engine: EngineName = "auto"
    ratios: Annotated[list[Ratio], Field(min_length=1)] = [0.05, 0.1, 0.25, 0.5]
    batch_size: Annotated[list[PositiveInt], Field(min_length=1)] = [1]
    context_tokens: Annotated[list[PositiveInt], Field(min_length=1)] = [128]
    new_tokens: Annotated[int, Field(ge=_LEAST_NEW_TOKENS)] = 32
    rounds: PositiveInt = 5
    seed: Annotated[int, Field(ge=0)] = 0
    peers: bool = False

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if self.model is not None and self.shape is not None:
            raise ValueError(
                f"model {self.model!r} and shape {self.shape!r} were both given; give --model for its "
                "weights, or --shape for random ones"
            )
        for name in ("revision", "adapter", "quantization") if self.shape is not None else ():
            if getattr(self, name) is not None:
                raise ValueError(f"{name} {getattr(self, name)!r} has no effect on a shape; leave it out")
        if self.shape is not None and self.profile is not None:
            raise ValueError(
                f"profile {self.profile!r} was not made for a shape; give --model or leave it out"
            )
        if self.rule == "gate" and self.shape is None and self.profile is None:
            raise ValueError(
                "rule 'gate' takes gate and surrogates from a profile; give --profile, or a --shape"
            )
        if self.rule == "cosine" and self.profile is not None:
            raise ValueError(
                f"profile {self.profile!r} has no effect under rule 'cosine'; leave one of them out"
            )
        for name in ("ratios", "batch_size", "context_tokens"):
            values = getattr(self, name)
            repeated = next((v for v in values if values.count(v) > 1), None)
            if repeated is not None:
                raise ValueError(f"{name} {repeated} is asked for twice")
        return self

    @property
    def gated(self) -> bool:
        """Whether a gate decides."""
        return self.profile is not None or self.rule == "gate"

    def recorded(self) -> dict[str, Any]:
        """What a result keeps of it: no places on this computer."""
        return without_places(self.model_dump(mode="json"))


def load_bench(path: Path | None, options: dict[str, Any]) -> BenchConfig:
    """The file's settings with `options` over them. Raises ConfigError for what cannot be measured."""
    return load_settings(BenchConfig, path, options)
