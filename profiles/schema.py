"""The skip profile: one JSON file that says what was measured on a model and what to skip.

Its fields are the contract between whoever calibrates and whoever generates. Loading is strict:
a malformed file is refused with the field, its value and what was expected.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, PrivateAttr, Tag, ValidationError, model_validator
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
from skipcal.profiles.files import check_output, dump_json, write_atomic, write_text_atomic
from skipcal.profiles.parts import (
    CalibrationInfo,
    Environment,
    GateInfo,
    GatePoint,
    GateSettings,
    LayerStatistics,
    ModelInfo,
    OperatingPoint,
    Regions,
    StaticSettings,
    Tuning,
)
from skipcal.profiles.reading import parse_object, read_bytes, validation_message
from skipcal.runtime.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from skipcal.profiles.tensors import GateTensors
    from skipcal.runtime.gate import GatePolicy

logger = logging.getLogger(__name__)

PROFILE_FORMAT: Literal["skipcal.profile/1"] = "skipcal.profile/1"
PROFILE_FILE = "skip_profile.json"  # its name inside a model folder or hub repository


def _rule(policy: Any) -> Any:
    """Which rule a policy is of; profiles of the first version need not say."""
    return policy.get("rule", "cosine") if isinstance(policy, dict) else getattr(policy, "rule", None)


class SkipProfile(BaseModel, PushToHubMixin):
    """A saved calibration: model, text, statistics by layer, regions, policy, operating points.

    operating_points: of the rule `cosine`.
    gate:             a fitted gate with operating points of its own; its tensors are in a file beside
                      this one.
    tuning:           a search for the policy within a budget, and all it measured.
    paper_policy:     the policy of the rule `cosine`, where `policy` is of another.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True, allow_inf_nan=False)
    format: Literal["skipcal.profile/1"]
    model: ModelInfo
    calibration: CalibrationInfo
    layers: dict[str, LayerStatistics]
    regions: Regions
    policy: Annotated[
        Annotated[SkipPolicy, Tag("cosine")]
        | Annotated[GateSettings, Tag("gate")]
        | Annotated[StaticSettings, Tag("static")],
        Discriminator(
            _rule,
            custom_error_type="unknown_rule",
            custom_error_message="rule is not known, expected 'cosine', 'gate' or 'static'",
        ),
    ]
    operating_points: list[OperatingPoint]
    environment: Environment
    config: dict[str, Any]
    gate: GateInfo | None = None
    tuning: Tuning | None = None
    paper_policy: SkipPolicy | None = None
    _tensors: GateTensors | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Equal in all that the file holds, wherever it was read."""
        return isinstance(other, SkipProfile) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

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
        if isinstance(self.policy, GateSettings):
            if self.gate is None:
                raise ValueError("expected an entry 'gate' beside a policy of the rule 'gate'")
            if (self.policy.tensors, self.policy.sha256) != (self.gate.tensors, self.gate.sha256):
                raise ValueError("expected one file of tensors, policy and gate name two")
        if self.paper_policy is None and not isinstance(self.policy, SkipPolicy):
            raise ValueError("expected an entry 'paper_policy' beside a policy of another rule than 'cosine'")
        if self.gate is not None and self.gate.layers and self.gate.layers[-1] >= count:
            raise ValueError(f"expected gates of layers below {count}, got {self.gate.layers[-1]}")
        if self.cosine_policy.cold_e > count or not self.regions.cold_s <= self.regions.cold_e <= count:
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
            return cls._parse(read_bytes(path), str(path), path.parent.absolute())
        shipped = shipped_profiles()
        if isinstance(source, str) and source in shipped:
            folder = Path(str(resources.files("skipcal.profiles")))
            return cls._parse((folder / f"{source}.json").read_bytes(), source, folder)
        raise Unavailable(
            f"{str(source)!r} is no file and no shipped profile ({', '.join(shipped) or 'none'}); "
            "make one with: skipcal profile"
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file atomically, after the tensors of a gate, which go beside it under their name.

        Raises OutputExists unless `overwrite` (the same tensors may be there), OutputError if it fails;
        then both files are as they were.
        """
        target, text = Path(path), self.to_json()
        if self.gate is None:
            write_text_atomic(target, text, overwrite=overwrite)
            return
        raw, beside = self.tensors().raw, target.parent / self.gate.tensors
        check_output(target, overwrite=overwrite)
        before = beside.read_bytes() if beside.is_file() else None
        if before != raw:
            write_atomic(beside, lambda part: _write_bytes(part, raw), overwrite=overwrite)
        try:
            write_text_atomic(target, text, overwrite=overwrite)
        except BaseException:
            if before is None:
                beside.unlink(missing_ok=True)
            elif before != raw:
                _write_bytes(beside, before)
            raise

    def to_json(self) -> str:
        """The text of the file."""
        fields = self.model_dump(mode="json")
        for name in ("gate", "tuning", "paper_policy"):
            if fields[name] is None:  # so that profiles from before there were any stay as they are
                del fields[name]
        return dump_json(fields)

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
        found = cls._parse(read_bytes(Path(str(file))), str(file), Path(str(file)).parent)
        if found.gate is not None:  # fetched here, so that the tensors lie beside the profile
            try:
                cached_file(str(name), found.gate.tensors, **kwargs)
            except OSError as error:
                raise Unavailable(
                    f"no {found.gate.tensors}, which the profile names, could be had from {str(name)!r}: "
                    f"{first_words(error)}"
                ) from error
        return found

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
    def _parse(cls, raw: bytes, where: str, folder: Path) -> Self:
        data = parse_object(raw, where)
        found = data.get("format")
        if found != PROFILE_FORMAT:
            raise ProfileError(f"{where} is not a profile: format is {found!r}, expected {PROFILE_FORMAT!r}")
        unknown = sorted(set(data) - set(cls.model_fields))
        if unknown:
            logger.warning("%s: unknown keys %s are kept; a newer skipcal wrote them", where, unknown)
        try:
            found = cls.model_validate_json(json.dumps(data))
        except (ValidationError, ValueError, RecursionError) as error:
            raise ProfileError(f"{where} is malformed: {validation_message(error)}") from error
        found._folder = folder
        return found

    def with_gate(self, gate: GateInfo, policy: GateSettings, tensors: GateTensors) -> Self:
        """This profile with a gate, whose rule is then its policy."""
        update = {"gate": gate, "policy": policy, "tuning": None, "paper_policy": self.cosine_policy}
        found = self.model_copy(update=update)
        found._tensors = tensors
        return found

    def with_tuning(self, tuning: Tuning, policy: SkipPolicy | GateSettings | StaticSettings) -> Self:
        """This profile with the policy that a search has chosen."""
        paper = None if isinstance(policy, SkipPolicy) else self.cosine_policy
        return self.model_copy(update={"tuning": tuning, "policy": policy, "paper_policy": paper})

    # Use

    def policy_for(self, target_skip_ratio: float | None = None) -> Policy:
        """The recommended policy, or the one of the same rule for another skip ratio.

        Ratios between two operating points get the threshold between theirs; 0 is the full model.
        Raises TargetOutOfReach beyond the last point and below the first; for a gate also Unavailable,
        ProfileError and ProfileMismatch when its tensors are missing or are others.
        """
        if isinstance(self.policy, GateSettings):
            return self.gate_policy(target_skip_ratio)
        if isinstance(self.policy, StaticSettings):
            if target_skip_ratio is not None:
                raise TargetOutOfReach(
                    f"target skip ratio {target_skip_ratio:g}: this profile's policy is a fixed set of "
                    f"{len(self.policy.layers)} FFNs; leave the ratio out, or tune again with another budget"
                )
            return self.static_policy(self.policy)
        return self.cosine_policy_for(target_skip_ratio)

    @property
    def cosine_policy(self) -> SkipPolicy:
        """The paper's rule: the policy, or what it was before a gate was fitted."""
        if isinstance(self.policy, SkipPolicy):
            return self.policy
        assert self.paper_policy is not None
        return self.paper_policy

    def cosine_policy_for(self, target_skip_ratio: float | None = None) -> SkipPolicy:
        """The paper's rule at a skip ratio; see `policy_for`."""
        policy = self.cosine_policy
        if target_skip_ratio is None:
            return policy
        threshold = threshold_for(self.operating_points, target_skip_ratio, never=FULL_MODEL_THRESHOLD)
        return replace(policy, threshold=threshold)

    def gate_policy(self, target_skip_ratio: float | None = None) -> GatePolicy:
        """The rule `gate` at a skip ratio; see `policy_for`. Raises ConfigError if there is no gate."""
        from skipcal.runtime.gate import NEVER, GatePolicy

        if self.gate is None:
            raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
        if target_skip_ratio is not None:
            threshold = threshold_for(self.gate.operating_points, target_skip_ratio, never=NEVER)
        elif isinstance(self.policy, GateSettings):
            threshold = self.policy.threshold
        else:
            raise ConfigError(
                "this profile's policy is not its gate, so the gate has no threshold of its own; "
                "give a target skip ratio"
            )
        tensors = self.tensors()
        return GatePolicy(
            gates=tensors.gates,
            surrogates=tensors.surrogates,
            threshold=threshold,
            warm_up_tokens=self.gate.warm_up_tokens,
        )

    def static_policy(self, settings: StaticSettings) -> Policy:
        """A fixed set of FFNs, with surrogates for them or without; see `gate_policy` for errors."""
        from skipcal.baselines.chosen_ffns import ChosenFFNs
        from skipcal.runtime.substituted import Substituted

        policy = ChosenFFNs(
            method="static",
            layers=tuple(settings.layers),
            probability=1.0,
            warm_up_tokens=settings.warm_up_tokens,
        )
        return Substituted(policy, self.tensors().surrogates) if settings.surrogates else policy

    def tensors(self) -> GateTensors:
        """Gate and surrogates, read once. Raises as `gate_policy` says."""
        from skipcal.profiles.tensors import GateTensors

        if self.gate is None:
            raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
        if self._tensors is None:
            if self._folder is None:
                raise Unavailable(
                    f"the profile was not read from a file, so {self.gate.tensors} cannot be found; load it "
                    "with SkipProfile.load(...)"
                )
            self._tensors = GateTensors.read(self._folder / self.gate.tensors, self.gate.sha256)
        self._tensors.check_belongs(
            layers=self.gate.layers,
            num_layers=self.model.num_layers,
            hidden_size=self.model.hidden_size,
            fingerprint=self.model.fingerprint,
        )
        return self._tensors

    def check_fits(self, model: PreTrainedModel, *, same_weights: bool | None = None) -> None:
        """Raise ProfileMismatch if `model` has another shape; warn if it has other weights.

        same_weights: raise for other weights too; None: where the policy is a gate, which was fitted to them.
        """
        from skipcal.arch.loading import fingerprint
        from skipcal.arch.locate import unwrap
        from skipcal.arch.quantization import quantization_name

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
        if dtype != self.model.dtype:
            logger.warning("the profile was made in %s, the model runs in %s", self.model.dtype, dtype)
        quantization = quantization_name(unwrap(model))
        if quantization != self.model.quantization:
            logger.warning(
                "the profile was made with quantization %s, the model has %s: thresholds may not hold",
                self.model.quantization or "none",
                quantization or "none",
            )
        if bool(getattr(model, "peft_config", None)) != (self.model.adapter is not None):
            logger.warning(
                "the profile was made %s, the model %s: thresholds may not hold",
                f"with the adapter {self.model.adapter}" if self.model.adapter else "without an adapter",
                "has none" if self.model.adapter else "has one",
            )
        revision = getattr(model.config, "_commit_hash", None)
        if revision and self.model.revision and revision != self.model.revision:
            logger.warning("the profile was made on revision %s, this is %s", self.model.revision, revision)
        if dtype == self.model.dtype and fingerprint(model) != self.model.fingerprint:
            if self._holds_tensors() if same_weights is None else same_weights:
                raise ProfileMismatch(
                    f"the profile was made on other weights of {self.model.name}, and a gate holds for the "
                    "weights it was fitted to; profile these with: skipcal profile, then: skipcal fit"
                )
            logger.warning(
                "the profile was made on other weights of %s: thresholds may not hold",
                self.model.name,
            )

    def _holds_tensors(self) -> bool:
        """Whether the policy needs tensors that were fitted to the model's weights."""
        return isinstance(self.policy, GateSettings) or getattr(self.policy, "surrogates", False)

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


def threshold_for(
    points: Sequence[OperatingPoint] | Sequence[GatePoint], target: float, *, never: float
) -> float:
    """Threshold for a skip ratio, linear between those of the two operating points around it.

    never: the threshold for a skip ratio of 0.
    """
    if not 0 <= target <= 1:
        raise ConfigError(
            f"target skip ratio {target} is not within [0, 1]; it is a fraction, not a percentage"
        )
    if target == 0:
        return never
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


def _write_bytes(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
