"""What a profile says, field by field, and as the text of its file.

The fields are the contract between whoever calibrates and whoever generates. Reading is strict: a malformed
file is refused with the field, its value and what was expected.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, PrivateAttr, Tag, ValidationError

from skipcal.core.policy import SkipPolicy, is_papers_rule, without_absent_tolerances
from skipcal.errors import ConfigError, ProfileError, Unavailable
from skipcal.files.reading import check_before_validation, parse_object, shown, validation_message
from skipcal.files.writing import dump_json
from skipcal.profiles.fixed_sets import FixedSets
from skipcal.profiles.parts import (
    CalibrationInfo,
    DamageRule,
    Environment,
    GateInfo,
    GatePoint,
    GateSettings,
    LayerStatistics,
    List,
    ModelInfo,
    OperatingPoint,
    Regions,
    StaticSettings,
    Tuning,
)

if TYPE_CHECKING:
    import pandas as pd

    from skipcal.profiles.set_tensors import SetTensors
    from skipcal.profiles.tensors import GateTensors

logger = logging.getLogger(__name__)

REQUIRED_STATISTICS = [name for name, field in LayerStatistics.model_fields.items() if field.is_required()]
PROFILE_FORMAT: Literal["skipcal.profile/1"] = "skipcal.profile/1"


def _rule(policy: Any) -> Any:
    """Which rule a policy is of; profiles of the first version need not say."""
    return policy.get("rule", "cosine") if isinstance(policy, dict) else getattr(policy, "rule", None)


class ProfileData(BaseModel):
    """A saved calibration: model, text, statistics by layer, regions, policy, operating points.

    operating_points: of the rule `cosine`.
    gate:             a fitted gate with operating points of its own; its tensors are in a file beside
                      this one.
    tuning:           a search for the policy within a budget, and all it measured.
    paper_policy:     the paper's rule, where `policy` is another.
    fixed_sets:       sets of FFNs with surrogates of their own, in a second file beside this one.
    damage_rule:      the rule `cosine` with layers weighed by damage, with operating points of its own.
    """

    # "constants": else NaN would be written as null, which means "not measured"
    model_config = ConfigDict(
        extra="allow", frozen=True, strict=True, allow_inf_nan=False, ser_json_inf_nan="constants"
    )
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
    operating_points: List[OperatingPoint]
    environment: Environment
    config: dict[str, Any]
    gate: GateInfo | None = None
    tuning: Tuning | None = None
    paper_policy: SkipPolicy | None = None
    fixed_sets: FixedSets | None = None
    damage_rule: DamageRule | None = None
    _tensors: GateTensors | None = PrivateAttr(default=None)
    _set_tensors: SetTensors | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Equal in all that the file holds, wherever it was read."""
        return isinstance(other, ProfileData) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @property
    def cosine_policy(self) -> SkipPolicy:
        """The paper's rule: the policy, or what it was before another was fitted or chosen."""
        if is_papers_rule(self.policy):
            return self.policy
        assert self.paper_policy is not None
        return self.paper_policy

    @property
    def points_of_policy(self) -> Sequence[OperatingPoint | GatePoint]:
        """The operating points of the rule that the policy is of; a fixed set has none."""
        if isinstance(self.policy, GateSettings):
            return self.gate.operating_points if self.gate is not None else []
        if isinstance(self.policy, StaticSettings):
            return []
        if self.policy.tolerances is None:
            return self.operating_points
        return self.damage_rule.operating_points if self.damage_rule is not None else []

    def tensors(self) -> GateTensors:
        """Gate and surrogates, read once. Raises as `gate_policy` says."""
        from skipcal.profiles.tensors import GateTensors, most_bytes

        if self.gate is None:
            raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
        layers, fit, hidden = self.gate.layers, self.gate.fit, self.model.hidden_size
        if self._tensors is None:
            self._tensors = GateTensors.read(
                self._beside(self.gate.tensors),
                self.gate.sha256,
                max_bytes=most_bytes(len(layers), fit.rank, hidden, fit.maps),
            )
        self._tensors.check_belongs(
            layers=layers,
            num_layers=self.model.num_layers,
            hidden_size=hidden,
            fingerprint=self.model.fingerprint,
        )
        return self._tensors

    def fitted_sets(self) -> FixedSets:
        """The fixed sets. Raises ConfigError if there are none."""
        if self.fixed_sets is None:
            raise ConfigError(
                "this profile has no fitted sets; fit some with: skipcal fit --method static --profile FILE"
            )
        return self.fixed_sets

    def set_tensors(self) -> SetTensors:
        """The surrogates of the fixed sets, read once. Raises as `tensors` does."""
        from skipcal.profiles.set_tensors import SetTensors, most_bytes

        fixed, hidden = self.fitted_sets(), self.model.hidden_size
        layers = [each.layers for each in fixed.sets]
        if self._set_tensors is None:
            self._set_tensors = SetTensors.read(
                self._beside(fixed.tensors),
                fixed.sha256,
                max_bytes=most_bytes(sum(map(len, layers)), fixed.fit.rank, hidden, fixed.fit.maps),
            )
        self._set_tensors.check_belongs(layers=layers, hidden_size=hidden, fingerprint=self.model.fingerprint)
        return self._set_tensors

    def files_beside(self) -> list[str]:
        """Names of the files of tensors that belong to this one."""
        return [part.tensors for part in (self.gate, self.fixed_sets) if part is not None]

    def tensor_files(self) -> dict[str, bytes]:
        """What these files hold, by name. Raises as `tensors` does."""
        files = {}
        if self.gate is not None:
            files[self.gate.tensors] = self.tensors().raw
        if self.fixed_sets is not None:
            files[self.fixed_sets.tensors] = self.set_tensors().raw
        return files

    def _beside(self, name: str) -> Path:
        if self._folder is None:
            raise Unavailable(
                f"the profile was not read from a file, so {name} cannot be found; load it "
                "with SkipProfile.load(...)"
            )
        return self._folder / name

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

    # The file

    def to_json(self) -> str:
        """The text of the file."""
        fields = self.model_dump(mode="json")
        for name in ("gate", "tuning", "paper_policy", "fixed_sets", "damage_rule"):
            if fields[name] is None:  # so that profiles from before there were any stay as they are
                del fields[name]
        for name in ("policy", "paper_policy"):
            if name in fields:
                fields[name] = without_absent_tolerances(fields[name])
        return dump_json(fields)

    def checked_json(self, where: str) -> str:
        """The text of the file, once it has been seen to load. Raises ProfileError if it does not."""
        try:
            text = self.to_json()
        except ValueError as error:  # NaN or an infinity, which JSON does not have
            raise ProfileError(f"{where} would be malformed: {error}") from error
        self._validated(text.encode(), where)
        return text

    @classmethod
    def _parse(cls, raw: bytes, where: str, folder: Path) -> Self:
        """A profile from the bytes of its file; `folder` is where its tensors are."""
        found = cls._validated(raw, where)
        if found.model_extra:
            keys = shown(sorted(found.model_extra))
            logger.warning("%s: unknown keys %s are kept; a newer skipcal wrote them", where, keys)
        found._folder = folder
        return found

    @classmethod
    def _validated(cls, raw: bytes, where: str) -> Self:
        """A profile from the bytes of its file. Raises ProfileError naming what is wrong."""
        data = parse_object(raw, where)
        found = data.get("format")
        if found != PROFILE_FORMAT:
            raise ProfileError(
                f"{where} is not a profile: format is {shown(found)}, expected {PROFILE_FORMAT!r}"
            )
        try:
            check_before_validation(data, cls.model_fields, REQUIRED_STATISTICS)
            return cls.model_validate_json(raw)  # from JSON, where an array may be a tuple
        except (ValidationError, ValueError, RecursionError) as error:
            raise ProfileError(f"{where} is malformed: {validation_message(error, data)}") from error
