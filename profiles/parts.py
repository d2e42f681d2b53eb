"""The parts of a profile: small frozen records of what was measured and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from skipcal.configs.fit import MAX_MAPS
from skipcal.core.policy import SkipPolicy

HISTOGRAM_BINS = 200  # equal bins over [-1, 1]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

T = TypeVar("T")
List = Annotated[list[T], Field(fail_fast=True)]  # one fault is enough: a hostile file may have millions
Count = Annotated[int, Field(ge=0)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Quantile = Literal["q05", "q25", "q50", "q75", "q95"]
QUANTILES: dict[Quantile, float] = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


class Part(BaseModel):
    """Strict and frozen: an unknown key or a value of another type is an error."""

    model_config = ConfigDict(**STRICT, frozen=True)


class ModelInfo(Part):
    """Which model was measured. `revision` is the commit where the name is a hub id.

    quantization: format of the weights, as `bitsandbytes:nf4`; None where they are plain.
    adapter:      folder name or hub id of what was put on the model; profiles without one do not name it.
    """

    name: str
    revision: str | None
    model_type: str
    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    intermediate_size: int | None
    dtype: str
    quantization: str | None
    fingerprint: str
    trust_remote_code: bool = False
    adapter: str | None = None

    @model_serializer(mode="wrap")
    def _without_absent_adapter(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if name != "adapter" or value is not None}


class CorpusInfo(Part):
    """Where one corpus came from and how much of it was used.

    format:          of a question set, how its records became text.
    short_documents: passed over, for they have fewer than `prompt_tokens` tokens.
    tokens:          over which the statistics are taken.
    opening:         the special tokens that each prompt or window began with, none where the tokenizer adds
                     none or a chat template has its own; None: not recorded, and windows began with none.
    joined_by:       what stood between the texts that were made one before it was cut; None: none were.
    """

    name: str
    source: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    sha256: str | None = None
    format: str | None = None
    documents: Count
    short_documents: Count
    prompts: Count
    tokens: Count
    opening: List[str] | None = None
    joined_by: str | None = None

    @property
    def place(self) -> str:
        """Source, configuration, split and format, as far as there are any, in one line."""
        return " ".join(filter(None, [self.source, self.config, self.split, self.format]))

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Running text has no format, and profiles from before these were recorded stay as they are."""
        fields: dict[str, Any] = serialize(self)
        optional = ("format", "opening", "joined_by")
        return {name: value for name, value in fields.items() if name not in optional or value is not None}


class CalibrationInfo(Part):
    """How the statistics were taken. Continuations are greedy and end at end-of-sequence.

    closed_loop: how realised ratios were measured, None if they were not: teacher-forced over the
                 calibration text, or by decoding its prompts.
    """

    mode: Literal["generate", "prefill"]
    corpora: List[CorpusInfo]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Count
    seed: int
    chat_template: bool
    closed_loop: Literal["teacher-forced", "decode"] | None

    @property
    def opening(self) -> list[str] | None:
        """The special tokens that all its texts began with; None: not recorded."""
        return self.corpora[0].opening if self.corpora else None


class LayerStatistics(Part):
    """Statistics of `cos_i` by layer: each list has L entries, `std` is the population's.

    block_influence: of the whole layer, by which ShortGPT removes layers (arXiv 2403.03853); within
                     [0, 2]. None in profiles of versions that did not measure it.
    """

    count: List[Count]
    mean: List[Cosine]
    std: List[Annotated[float, Field(ge=0)]]
    min: List[Cosine]
    q05: List[Cosine]
    q25: List[Cosine]
    q50: List[Cosine]
    q75: List[Cosine]
    q95: List[Cosine]
    norm_ratio_mean: List[Annotated[float, Field(ge=0)]]
    histogram: List[List[Count]]
    block_influence: List[float] | None = None

    @model_validator(mode="after")
    def _equal_lengths(self) -> Self:
        lists = {name: getattr(self, name) for name in type(self).model_fields}
        lengths = {name: len(values) for name, values in lists.items() if values is not None}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"expected lists of one length, got {lengths}")
        bins = {len(row) for row in self.histogram}
        if bins - {HISTOGRAM_BINS}:
            raise ValueError(f"expected {HISTOGRAM_BINS} bins a layer in histogram, got {sorted(bins)}")
        return self


class Regions(Part):
    """The skippable region [cold_s, cold_e) and how well the curve supports it.

    monotonicity: Spearman's rho of mean cosine and layer inside the region, None below 3 layers.
    cold_s_interval, cold_e_interval: 95 % bootstrap intervals over prompts.
    """

    cold_s: Count
    cold_e: Count
    method: Literal["isotonic", "given"]
    fit_r2: float | None
    monotonicity: Cosine | None
    cold_s_interval: tuple[Count, Count] | None
    cold_e_interval: tuple[Count, Count] | None
    warnings: List[str]


class OperatingPoint(Part):
    """A threshold and the skip ratio it brings, over tokens after the warm-up.

    predicted_skip_ratio: by this threshold on the clean trace, which no skip has perturbed.
    realised_skip_ratio:  measured with skipping on, as `calibration.closed_loop` says.
    verified_skip_ratio:  measured by decoding held-out prompts; None unless asked for.
    """

    target_skip_ratio: Ratio
    threshold: Annotated[float, Field(ge=-1, le=2)]
    predicted_skip_ratio: Ratio
    realised_skip_ratio: Ratio | None = None
    verified_skip_ratio: Ratio | None = None


class DamageRule(Part):
    """The rule `cosine` with tolerances: layers weighed by what skipping their FFN alone loses.

    excess_nll: by layer, nats per token past the warm-up, over the closed loop's text.
    tokens:     over which it is the mean.
    policy:     its region, bound and tolerances; each of the operating points is a threshold of it.
    """

    excess_nll: List[float]
    tokens: Annotated[int, Field(ge=1)]
    policy: SkipPolicy
    operating_points: List[OperatingPoint]


class Environment(Part):
    """What made the file.

    seconds:   wall time of the calibration; None where it went on from an earlier run's finished work, and
               in profiles of versions that did not measure it.
    processes: how many shared the work.
    """

    skipcal: str
    python: str
    torch: str
    transformers: str
    device: str
    created_at: str
    seconds: float | None = None
    processes: int | None = None

    @model_serializer(mode="wrap")
    def _without_absent(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Profiles from before these were measured stay as they are."""
        fields: dict[str, Any] = serialize(self)
        optional = ("seconds", "processes")
        return {name: value for name, value in fields.items() if name not in optional or value is not None}


TENSORS_SUFFIX = ".surrogates.safetensors"  # after the stem of the profile beside it


def tensors_file(profile: Path, suffix: str = TENSORS_SUFFIX) -> str:
    """Name of the tensors of a profile at `profile`: its stem, in the characters that a FileName has."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", profile.stem).lstrip("._-")[:150]
    return f"{stem or 'gate'}{suffix}"


FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors$", max_length=200)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class StaticSettings:
    """A fixed set of FFNs that every token past the warm-up skips.

    surrogates: whether those of the profile's gate stand in for them, as `skipcal tune` may choose, or those
                that were "fitted" to the set by `skipcal fit --method static`.
    """

    __pydantic_config__ = STRICT

    layers: List[Count]
    warm_up_tokens: Annotated[int, Field(ge=0)]
    surrogates: bool | Literal["fitted"] = False
    rule: Literal["static"] = "static"


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """The policy of a profile with a gate, as its JSON holds it: the tensors are in a file beside it.

    threshold: predicted log damage below which an FFN is skipped.
    """

    __pydantic_config__ = STRICT

    threshold: float
    warm_up_tokens: Annotated[int, Field(ge=0)]
    tensors: FileName
    sha256: Sha256
    rule: Literal["gate"] = "gate"


class GatePoint(Part):
    """A threshold of the gate and the skip ratio it brings, over tokens after the warm-up.

    predicted_skip_ratio: over the last sweep's scores, where the stream was perturbed by the skips of
                          the fitted ratio.
    realised_skip_ratio:  measured teacher-forced with this threshold, over windows not fitted on.
    by_corpus:            the same of each corpus alone: texts differ in how much they let skip.
    """

    target_skip_ratio: Ratio
    threshold: float
    predicted_skip_ratio: Ratio
    realised_skip_ratio: Ratio
    by_corpus: dict[str, Ratio]


class Fit(Part):
    """What is kept of every fit: its text, its settings, and what it made.

    damage:          what surrogates and choices go by: rise of the loss by a Fisher metric from a backward
                     pass, or relative error weighed by layer, measured without one.
    maps:            low-rank maps of each surrogate, of which a token reads one.
    surrogate_share: bytes that a token reads of a surrogate over those of the FFN it stands in for.
    """

    corpora: List[CorpusInfo]
    windows: Count
    window_tokens: Count
    tokens: Count
    seed: int
    damage: Literal["fisher", "relative-error"]
    rank: Annotated[int, Field(ge=1)]
    maps: Annotated[int, Field(ge=1, le=MAX_MAPS)] = 1
    surrogate_share: float
    seconds: float
    peak_memory_bytes: Count
    config: dict[str, Any]

    @model_serializer(mode="wrap")
    def _without_a_single_map(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Profiles from before there were several stay as they are."""
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if name != "maps" or value != 1}


class GateFit(Fit):
    """How gate and surrogates were fitted.

    sweeps:          skip ratio of each sweep over the text, the first with nothing skipped.
    gate_r_squared:  variance of the log damage that each gate explains on the text it was fitted on.
    surrogate_error: share of the variance of f that each surrogate leaves, there too.
    """

    sweeps: List[Ratio]
    gate_r_squared: List[float]
    surrogate_error: List[float]


class GateInfo(Part):
    """A fitted gate: candidate layers, operating points, and how it was made."""

    tensors: FileName
    sha256: Sha256
    layers: List[Count]
    warm_up_tokens: Count
    operating_points: List[GatePoint]
    fit: GateFit


class Budget(Part):
    """What was allowed; None: anything."""

    max_kl: float | None
    max_perplexity_increase: float | None
    min_speedup: float | None


class TunedPoint(Part):
    """A policy measured teacher-forced over windows of text.

    line:        whose curve it is on. rule: one of skipcal.configs.tune.RULES, or random.
    kl:          to the full model, nats per decoded token, those of the warm-up included.
    excess_nll:  loss over the full model's, the same. `_low`, `_high`: 95 % bootstrap interval over windows.
    ideal_speed_up: over the full model if time were bytes read, past the warm-up, of the `requests` in the
                 search's configuration that run together (one where it names none); surrogates are counted.
    on_front:    nothing that was measured skips as much with less divergence.
    loses_to_random: random skipping of as many FFNs diverges less.
    """

    line: str
    rule: str
    threshold: float | None
    max_skips: int | None
    warm_up_tokens: Count
    skip_ratio: Ratio
    skip_ratio_all: Ratio
    kl: float
    kl_low: float
    kl_high: float
    excess_nll: float
    excess_nll_low: float
    excess_nll_high: float
    ideal_speed_up: float
    on_front: bool
    loses_to_random: bool


class Tuning(Part):
    """A search for the point that skips most within a budget, and all it measured."""

    budget: Budget
    text: dict[str, Any]
    windows: Count
    points: List[TunedPoint]
    chosen: Count
    config: dict[str, Any]

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.chosen >= len(self.points):
            raise ValueError(f"expected chosen below the {len(self.points)} points, got {self.chosen}")
        return self
