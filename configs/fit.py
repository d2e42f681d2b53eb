"""The configuration of `skipcal fit`: what a gate and its surrogates are fitted on, and how."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from skipcal.configs.run import CalibrationSettings, PositiveInt, load_settings

SURROGATE_BUDGET = 0.05  # bytes that a token reads of a surrogate over those of its FFN
MAX_MAPS = 256  # of a surrogate
MAPS = 8  # of a surrogate, of which a token reads one: with this budget some 12 % of a model's bytes

Fraction = Annotated[float, Field(gt=0, lt=1)]


class FitConfig(CalibrationSettings):
    """Everything that decides the result of `skipcal fit`.

    method:           "gate": a gate that decides for each token, and surrogates of what it skips; "static":
                      fixed sets that every token skips, with surrogates of their own.
    profile:          file, folder, shipped name or hub id; its model and warm-up are taken. None: the
                      embedded model's.
    prompts:          windows of text per corpus; None: 28, or 12 of the short embedded text.
    prompt_tokens:    tokens of a window.
    target_skip_ratio: of a gate, share of all FFNs skipped in the sweep on policy. Serves smaller ratios
                      well, larger ones less so. Of fixed sets, that of the largest.
    surrogate_budget: bytes that a token reads of a surrogate over those of its FFN; rank: instead of it.
    maps:             low-rank maps of a surrogate, of which a token reads one; None: 8 for a gate, 1 for
                      fixed sets. Memory grows with them, and what a token reads does not.
    sweeps:           of a gate, sweeps with skipping on, after one without. All but the last say which tokens
                      skip.
    damage:           "fisher" needs one backward pass; "relative-error" needs none.
    damage_prompts:   windows per corpus for it.
    closed_loop_prompts: windows per corpus, not fitted on, over which a gate's realised ratios are measured,
                      or what fixed sets lose; None: 10, or 4 of the embedded text. Documents of one corpus
                      differ by 0.03 in their ratio.
    """

    method: Literal["gate", "static"] = "gate"
    profile: str | None = None
    prompts: PositiveInt | None = None
    prompt_tokens: Annotated[int, Field(ge=8)] = 512
    batch_size: PositiveInt = 4
    seed: Annotated[int, Field(ge=0)] = 0
    target_skip_ratio: Fraction = 0.25
    surrogate_budget: Fraction = SURROGATE_BUDGET
    rank: PositiveInt | None = None
    maps: Annotated[int, Field(ge=1, le=MAX_MAPS)] | None = None
    sweeps: Annotated[int, Field(ge=0)] = 2
    damage: Literal["fisher", "relative-error"] = "fisher"
    damage_prompts: PositiveInt = 8
    closed_loop_prompts: PositiveInt | None = None

    @model_validator(mode="after")
    def _options_fit_together(self) -> Self:
        if self.method == "static" and "sweeps" in self.model_fields_set:
            raise ValueError("sweeps is of a gate; fixed sets are swept over once for each FFN: leave it out")
        if self.rank is not None and "surrogate_budget" in self.model_fields_set:
            raise ValueError(
                f"rank {self.rank} and surrogate_budget {self.surrogate_budget:g} were both given; give one"
            )
        if self.damage_prompts > self.windows():
            raise ValueError(
                f"damage_prompts {self.damage_prompts} are more than the {self.windows()} windows of a "
                "corpus; raise --prompts or lower --damage-prompts"
            )
        return self

    def maps_each(self) -> int:
        """Maps of a surrogate."""
        return self.maps or (MAPS if self.method == "gate" else 1)

    def windows(self) -> int:
        """Windows per corpus to fit on."""
        return self.prompts or (12 if self._short_text() else 28)

    def loop_windows(self) -> int:
        """Windows per corpus for the closed loop."""
        return self.closed_loop_prompts or (4 if self._short_text() else 10)

    def _short_text(self) -> bool:
        return self.corpora() == ["embedded"] and not self.data_files


def load_fit(path: Path | None, options: dict[str, Any]) -> FitConfig:
    """The file's settings with `options` over them; see `configs.run.load_config`."""
    return load_settings(FitConfig, path, options)
