"""The skip profile: one JSON file that says what was measured on a model and what to skip.

Its fields are the contract between whoever calibrates and whoever generates. Loading is strict:
a malformed file is refused with the field, its value and what was expected.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Discriminator, PrivateAttr, Tag, ValidationError, model_validator

from skipcal.core.policy import Policy, SkipPolicy
from skipcal.errors import ConfigError, ProfileError, Unavailable
from skipcal.profiles import policies
from skipcal.profiles.agreement import check_agreement
from skipcal.profiles.files import (
    check_output,
    dump_json,
    remove_output,
    write_bytes_atomic,
    write_text_atomic,
)
from skipcal.profiles.fits import check_fits
from skipcal.profiles.parts import (
    CalibrationInfo,
    Environment,
    GateInfo,
    GateSettings,
    LayerStatistics,
    List,
    ModelInfo,
    OperatingPoint,
    Regions,
    StaticSettings,
    Tuning,
)
from skipcal.profiles.policies import threshold_for as threshold_for
from skipcal.profiles.reading import (
    check_before_validation,
    parse_object,
    read_bytes,
    shown,
    validation_message,
)
from skipcal.profiles.sources import PROFILE_FILE as PROFILE_FILE
from skipcal.profiles.sources import HubOptions, commit_of, fetch, locate
from skipcal.profiles.sources import model_slug as model_slug
from skipcal.profiles.sources import shipped_profiles as shipped_profiles

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from skipcal.core.gate import GatePolicy
    from skipcal.profiles.tensors import GateTensors

logger = logging.getLogger(__name__)

REQUIRED_STATISTICS = [name for name, field in LayerStatistics.model_fields.items() if field.is_required()]
PROFILE_FORMAT: Literal["skipcal.profile/1"] = "skipcal.profile/1"


def _rule(policy: Any) -> Any:
    """Which rule a policy is of; profiles of the first version need not say."""
    return policy.get("rule", "cosine") if isinstance(policy, dict) else getattr(policy, "rule", None)


class SkipProfile(BaseModel):
    """A saved calibration: model, text, statistics by layer, regions, policy, operating points.

    operating_points: of the rule `cosine`.
    gate:             a fitted gate with operating points of its own; its tensors are in a file beside
                      this one.
    tuning:           a search for the policy within a budget, and all it measured.
    paper_policy:     the policy of the rule `cosine`, where `policy` is of another.
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
    _tensors: GateTensors | None = PrivateAttr(default=None)
    _folder: Path | None = PrivateAttr(default=None)

    def __eq__(self, other: object) -> bool:
        """Equal in all that the file holds, wherever it was read."""
        return isinstance(other, SkipProfile) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    @model_validator(mode="after")
    def _one_profile(self) -> Self:
        check_agreement(self)
        return self

    # Files

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Read a profile: a file, a folder with `skip_profile.json`, the name of a shipped one, or a hub id.

        A hub id is `org/name` or `org/name@revision`; `from_pretrained` takes more options. Unknown top-level
        keys, of a newer writer, are kept and named in a warning. Raises Unavailable when there is no such
        profile, ProfileError when it is malformed.
        """
        place = locate(source)
        if isinstance(place, Path):
            return cls._parse(read_bytes(place), str(place), place.parent.absolute())
        try:
            return cls.from_pretrained(place.name, revision=place.revision)
        except Unavailable as error:
            raise Unavailable(
                f"{source!r} is no file, no folder and no shipped profile "
                f"({', '.join(shipped_profiles())}); as a hub id: {error}"
            ) from error

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the file atomically, after the tensors of a gate, which go beside it under their name.

        Raises OutputExists unless `overwrite` (the same tensors may be there), OutputError if it fails;
        then both files are as they were. Raises ProfileError for a profile that could not be loaded again.
        """
        target = Path(path)
        text = self.checked_json(str(target))
        if self.gate is None:
            write_text_atomic(target, text, overwrite=overwrite)
            return
        raw, beside = self.tensors().raw, target.parent / self.gate.tensors
        check_output(target, overwrite=overwrite, alone=False)
        before = beside.read_bytes() if beside.is_file() else None
        if before != raw:
            write_bytes_atomic(beside, raw, overwrite=overwrite)
        try:
            write_text_atomic(target, text, overwrite=overwrite)
        except BaseException:
            if before is None:
                remove_output(beside)
            elif before != raw:
                beside.write_bytes(before)
            raise

    def to_json(self) -> str:
        """The text of the file."""
        fields = self.model_dump(mode="json")
        for name in ("gate", "tuning", "paper_policy"):
            if fields[name] is None:  # so that profiles from before there were any stay as they are
                del fields[name]
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
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        token: bool | str | None = None,
        cache_dir: str | Path | None = None,
        subfolder: str = "",
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> Self:
        """Read `skip_profile.json` of a model folder or hub repository, and fetch the tensors of a gate.

        The options are those of `from_pretrained` in transformers. Raises as `load` does.
        """
        options: HubOptions = {
            "token": token,
            "cache_dir": cache_dir,
            "subfolder": subfolder,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        file = fetch(str(name), PROFILE_FILE, options, revision=revision)
        found = cls._parse(read_bytes(file), str(file), file.parent.absolute())
        if found.gate is not None:  # of the same commit, so that the tensors lie beside the profile
            commit = None if os.path.isdir(name) else commit_of(file) or revision
            fetch(str(name), found.gate.tensors, options, revision=commit, why=", which the profile names,")
        return found

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        overwrite: bool = True,
        model_card: bool = False,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **push_options: Any,
    ) -> None:
        """Write `skip_profile.json` into a model folder, beside the model's own files.

        Like the other files of a model folder it replaces an older one unless told otherwise.

        model_card:   also write its section of README.md and the figure in it; the rest of README.md stays.
        push_to_hub:  then push it to `repo_id` (by default the folder's name), with `push_options`.
        """
        from skipcal.profiles.sharing import warn_of_older_section, write_card

        if not push_to_hub and (repo_id is not None or push_options):
            given = sorted([*push_options, *(["repo_id"] if repo_id is not None else [])])
            raise ConfigError(f"{', '.join(given)} without push_to_hub=True has no effect; leave it out")
        self.save(Path(folder) / PROFILE_FILE, overwrite=overwrite)
        if model_card:
            write_card(self, Path(folder))
        else:
            warn_of_older_section(self, Path(folder))
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).absolute().name, **push_options)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        commit_description: str | None = None,
        model_card: bool = True,
    ) -> str:
        """Upload the profile, the tensors of a gate and a section of the model card; return the commit's URL.

        The repository is made if there is none. In a README.md that is there only skipcal's section is
        written; nothing else in the repository is touched.

        revision:   branch to push to, made if it is missing. create_pr: open a pull request instead.
        model_card: False: upload profile and tensors alone.
        Raises OutputError when the hub cannot be written to.
        """
        from skipcal.profiles.sharing import push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            commit_description=commit_description,
            model_card=model_card,
        )

    def model_card(self, source: str = PROFILE_FILE) -> str:
        """The profile as a section of a model card; its commands name it `source`, a file or a hub id."""
        from skipcal.profiles.card import card_section

        return card_section(self, source)

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
        return policies.policy_for(self, target_skip_ratio)

    @property
    def cosine_policy(self) -> SkipPolicy:
        """The paper's rule: the policy, or what it was before a gate was fitted."""
        if isinstance(self.policy, SkipPolicy):
            return self.policy
        assert self.paper_policy is not None
        return self.paper_policy

    def cosine_policy_for(self, target_skip_ratio: float | None = None) -> SkipPolicy:
        """The paper's rule at a skip ratio; see `policy_for`."""
        return policies.cosine_policy_for(self, target_skip_ratio)

    def gate_policy(self, target_skip_ratio: float | None = None) -> GatePolicy:
        """The rule `gate` at a skip ratio; see `policy_for`. Raises ConfigError if there is no gate."""
        return policies.gate_policy_for(self, target_skip_ratio)

    def static_policy(self, settings: StaticSettings) -> Policy:
        """A fixed set of FFNs, with surrogates for them or without; see `gate_policy` for errors."""
        return policies.static_policy(self, settings)

    def tensors(self) -> GateTensors:
        """Gate and surrogates, read once. Raises as `gate_policy` says."""
        from skipcal.profiles.tensors import GateTensors, most_bytes

        if self.gate is None:
            raise ConfigError("this profile has no gate; fit one with: skipcal fit --profile FILE")
        layers, rank, hidden = self.gate.layers, self.gate.fit.rank, self.model.hidden_size
        if self._tensors is None:
            if self._folder is None:
                raise Unavailable(
                    f"the profile was not read from a file, so {self.gate.tensors} cannot be found; load it "
                    "with SkipProfile.load(...)"
                )
            self._tensors = GateTensors.read(
                self._folder / self.gate.tensors,
                self.gate.sha256,
                max_bytes=most_bytes(len(layers), rank, hidden),
            )
        self._tensors.check_belongs(
            layers=layers,
            num_layers=self.model.num_layers,
            hidden_size=hidden,
            fingerprint=self.model.fingerprint,
        )
        return self._tensors

    def check_fits(self, model: PreTrainedModel, *, same_weights: bool | None = None) -> None:
        """Raise ProfileMismatch if `model` has another shape; warn if it has other weights.

        same_weights: raise for other weights too; None: where the policy is a gate, which was fitted to them.
        """
        check_fits(self, model, same_weights=same_weights)

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
