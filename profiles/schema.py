"""The skip profile: one JSON file that says what was measured on a model and what to skip.

Its fields are the contract between whoever calibrates and whoever generates. Loading is strict:
a malformed file is refused with the field, its value and what was expected.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from transformers.utils import PushToHubMixin

from skipcal.arch.embedded import EMBEDDED_MODEL
from skipcal.errors import (
    ConfigError,
    ProfileError,
    ProfileMismatch,
    TargetOutOfReach,
    Unavailable,
    first_words,
)
from skipcal.profiles.files import dump_json, write_text_atomic
from skipcal.runtime.policy import FULL_MODEL_THRESHOLD, SkipPolicy

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROFILE_FORMAT: Literal["skipcal.profile/1"] = "skipcal.profile/1"
PROFILE_FILE = "skip_profile.json"  # its name inside a model folder or hub repository
MAX_PROFILE_BYTES = 64 * 2**20  # 80 layers and 50 corpora take 12 MB; more is no profile
HISTOGRAM_BINS = 200  # equal bins over [-1, 1]

Count = Annotated[int, Field(ge=0)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Quantile = Literal["q05", "q25", "q50", "q75", "q95"]
QUANTILES: dict[Quantile, float] = {"q05": 0.05, "q25": 0.25, "q50": 0.5, "q75": 0.75, "q95": 0.95}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelInfo(_Part):
    """Which model was measured. `revision` is the commit where the name is a hub id."""

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


class CorpusInfo(_Part):
    """Where one corpus came from and how much of it was used.

    format:          of a question set, how its records became text.
    short_documents: passed over, for they have fewer than `prompt_tokens` tokens.
    tokens:          over which the statistics are taken.
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

    @model_serializer(mode="wrap")
    def _without_absent_format(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Running text has no format, and profiles from before there were any stay as they are."""
        fields: dict[str, Any] = serialize(self)
        return {name: value for name, value in fields.items() if name != "format" or value is not None}


class CalibrationInfo(_Part):
    """How the statistics were taken. Continuations are greedy and end at end-of-sequence.

    closed_loop: how realised ratios were measured, None if they were not: teacher-forced over the
                 calibration text, or by decoding its prompts.
    """

    mode: Literal["generate", "prefill"]
    corpora: list[CorpusInfo]
    prompt_tokens: Annotated[int, Field(ge=1)]
    new_tokens: Count
    seed: int
    chat_template: bool
    closed_loop: Literal["teacher-forced", "decode"] | None


class LayerStatistics(_Part):
    """Statistics of `cos_i` by layer: each list has L entries, `std` is the population's.

    block_influence: of the whole layer, by which ShortGPT removes layers (arXiv 2403.03853); within
                     [0, 2]. None in profiles of versions that did not measure it.
    """

    count: list[Count]
    mean: list[Cosine]
    std: list[Annotated[float, Field(ge=0)]]
    min: list[Cosine]
    q05: list[Cosine]
    q25: list[Cosine]
    q50: list[Cosine]
    q75: list[Cosine]
    q95: list[Cosine]
    norm_ratio_mean: list[Annotated[float, Field(ge=0)]]
    histogram: list[list[Count]]
    block_influence: list[float] | None = None

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


class Regions(_Part):
    """The skippable region [cold_s, cold_e) and how well the curve supports it.

    monotonicity: Spearman's rho of mean cosine and layer inside the region, None below 3 layers.
    *_interval:   95 % bootstrap interval over prompts.
    """

    cold_s: Count
    cold_e: Count
    method: Literal["isotonic", "given"]
    fit_r2: float | None
    monotonicity: Cosine | None
    cold_s_interval: tuple[Count, Count] | None
    cold_e_interval: tuple[Count, Count] | None
    warnings: list[str]


class OperatingPoint(_Part):
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


class Environment(_Part):
    """What made the file."""

    skipcal: str
    python: str
    torch: str
    transformers: str
    device: str
    created_at: str


class SkipProfile(BaseModel, PushToHubMixin):
    """A saved calibration: model, text, statistics by layer, regions, policy, operating points."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    format: Literal["skipcal.profile/1"]
    model: ModelInfo
    calibration: CalibrationInfo
    layers: dict[str, LayerStatistics]
    regions: Regions
    policy: SkipPolicy
    operating_points: list[OperatingPoint]
    environment: Environment
    config: dict[str, Any]

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if "pooled" not in self.layers:
            raise ValueError("expected an entry 'pooled' in layers")
        count = self.model.num_layers
        for name, statistics in self.layers.items():
            if len(statistics.mean) != count:
                raise ValueError(
                    f"expected {count} entries (model.num_layers) in layers.{name}, "
                    f"got {len(statistics.mean)}"
                )
        if self.policy.cold_e > count or not self.regions.cold_s <= self.regions.cold_e <= count:
            raise ValueError(f"expected regions and policy within [0, {count}]")
        return self

    # Files

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a profile file, or by its name one that is shipped with skipcal.

        Raises Unavailable when there is no such file, ProfileError when it is malformed. Unknown
        top-level keys, of a newer writer, are kept and named in a warning.
        """
        path = Path(source)
        if path.is_file():
            return cls._parse(_read(path), str(path))
        shipped = shipped_profiles()
        if isinstance(source, str) and source in shipped:
            file = resources.files("skipcal.profiles") / f"{source}.json"
            return cls._parse(file.read_bytes(), source)
        raise Unavailable(
            f"{str(source)!r} is no file and no shipped profile ({', '.join(shipped) or 'none'}); "
            "make one with: skipcal profile"
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file atomically. Raises OutputExists unless `overwrite`, OutputError if it fails."""
        write_text_atomic(Path(path), self.to_json(), overwrite=overwrite)

    def to_json(self) -> str:
        """The text of the file."""
        return dump_json(self.model_dump(mode="json"))

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> Self:
        """Read `skip_profile.json` of a model folder or hub repository.

        kwargs: `revision`, `token`, `cache_dir`, ... of `transformers.utils.cached_file`.
        """
        from transformers.utils import cached_file

        try:
            file = cached_file(str(name), PROFILE_FILE, **kwargs)
        except OSError as error:
            raise Unavailable(
                f"no {PROFILE_FILE} could be had from {str(name)!r}: {first_words(error)}"
            ) from error
        return cls._parse(_read(Path(str(file))), str(file))

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        push_to_hub: bool = False,
        overwrite: bool = True,
        **kwargs: Any,
    ) -> None:
        """Write `skip_profile.json` into a model folder, beside the model's own files.

        Like the other files of a model folder it replaces an older one unless told otherwise.
        """
        self.save(Path(folder) / PROFILE_FILE, overwrite=overwrite)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(folder).name), **kwargs)

    @classmethod
    def _parse(cls, raw: bytes, where: str) -> Self:
        try:
            data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise ProfileError(f"{where} is not a profile: no valid JSON ({error})") from error
        if not isinstance(data, dict):
            raise ProfileError(f"{where} is not a profile: expected an object, got {type(data).__name__}")
        found = data.get("format")
        if found != PROFILE_FORMAT:
            raise ProfileError(f"{where} is not a profile: format is {found!r}, expected {PROFILE_FORMAT!r}")
        unknown = sorted(set(data) - set(cls.model_fields))
        if unknown:
            logger.warning("%s: unknown keys %s are kept; a newer skipcal wrote them", where, unknown)
        try:
            return cls.model_validate_json(json.dumps(data))
        except (ValidationError, ValueError, RecursionError) as error:
            raise ProfileError(f"{where} is malformed: {validation_message(error)}") from error

    # Use

    def policy_for(self, target_skip_ratio: float | None = None) -> SkipPolicy:
        """The recommended policy, or the one for another skip ratio.

        Ratios between two operating points get the threshold between theirs; 0 is the full model.
        Raises TargetOutOfReach beyond the last point and below the first.
        """
        if target_skip_ratio is None:
            return self.policy
        threshold = threshold_for(self.operating_points, target_skip_ratio)
        return replace(self.policy, threshold=threshold)

    def check_fits(self, model: PreTrainedModel) -> None:
        """Raise ProfileMismatch if `model` has another shape; warn if it has other weights."""
        from skipcal.arch.loading import fingerprint

        config = model.config.get_text_config()
        asked = {
            "model type": (self.model.model_type, config.model_type),
            "number of layers": (self.model.num_layers, config.num_hidden_layers),
            "hidden size": (self.model.hidden_size, config.hidden_size),
        }
        different = [
            f"{what} {mine!r}, the model's is {its!r}" for what, (mine, its) in asked.items() if mine != its
        ]
        if different:
            raise ProfileMismatch(
                f"the profile was made for {self.model.name}: {'; '.join(different)}; "
                "make one for this model with: skipcal profile --model NAME"
            )
        dtype = str(model.dtype).removeprefix("torch.")
        comparable = dtype == self.model.dtype and not any(p.is_meta for p in model.parameters())
        if dtype != self.model.dtype:
            logger.warning("the profile was made in %s, the model runs in %s", self.model.dtype, dtype)
        revision = getattr(model.config, "_commit_hash", None)
        if revision and self.model.revision and revision != self.model.revision:
            logger.warning("the profile was made on revision %s, this is %s", self.model.revision, revision)
        if comparable and fingerprint(model) != self.model.fingerprint:
            logger.warning(
                "the profile was made on other weights of %s: thresholds may not hold",
                self.model.name,
            )

    def to_frame(self) -> pd.DataFrame:
        """Statistics in long form: corpus, layer, part (generated or prefill), stat, value, n."""
        import pandas as pd

        part = "generated" if self.calibration.mode == "generate" else "prefill"
        stats = [name for name in LayerStatistics.model_fields if name not in ("count", "histogram")]
        rows = [
            (corpus, layer, part, stat, value, statistics.count[layer])
            for corpus, statistics in self.layers.items()
            for stat in stats
            if getattr(statistics, stat) is not None
            for layer, value in enumerate(getattr(statistics, stat))
        ]
        return pd.DataFrame(rows, columns=["corpus", "layer", "part", "stat", "value", "n"])


def threshold_for(points: list[OperatingPoint], target: float) -> float:
    """Threshold for a skip ratio, linear between those of the two operating points around it."""
    if not 0 <= target <= 1:
        raise ConfigError(
            f"target skip ratio {target} is not within [0, 1]; it is a fraction, not a percentage"
        )
    if target == 0:
        return FULL_MODEL_THRESHOLD
    known = {point.target_skip_ratio: point.threshold for point in points}
    for ratio, threshold in known.items():
        if abs(ratio - target) < 1e-9:
            return threshold
    if not known or not min(known) <= target <= max(known):
        reach = f"{min(known):g} to {max(known):g}" if known else "none"
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach: this profile has operating points from {reach}; "
            "choose one within, 0 for the full model, or profile again with other regions"
        )
    below = max(ratio for ratio in known if ratio < target)
    above = min(ratio for ratio in known if ratio > target)
    weight = (target - below) / (above - below)
    return known[below] + weight * (known[above] - known[below])


def model_slug(name: str | None) -> str:
    """File-name form of a model's name: its last part in lower case; None is the embedded model.

    `meta-llama/Llama-2-7b-hf` gives `llama-2-7b-hf`.
    """
    last = (name or EMBEDDED_MODEL).rstrip("/").rpartition("/")[2]
    return re.sub(r"[^a-z0-9._-]+", "-", last.lower()).strip("-.") or "model"


def shipped_profiles() -> list[str]:
    """Names of the profiles that come with skipcal."""
    files = resources.files("skipcal.profiles").iterdir()
    return sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json"))


def validation_message(error: Exception) -> str:
    """The first fault that pydantic found, in one line: field, what is wrong, the value."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first, *rest = error.errors(include_url=False)
    field = ".".join(str(part) for part in first["loc"]) or "the document"
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{field}: {message}, got {shown}{more}"


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{path} is not a profile: it is larger than {MAX_PROFILE_BYTES >> 20} MiB")
    return raw


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
