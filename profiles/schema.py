"""The skip profile: one JSON file that says what was measured on a model and what to skip.

What it says stands in `data`; here is what is done with it.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import model_validator

from skipcal.core.policy import SkipPolicy, is_papers_rule
from skipcal.errors import ConfigError, Unavailable
from skipcal.files.reading import (
    read_bytes,
)
from skipcal.files.writing import (
    check_output,
    remove_output,
    write_bytes_atomic,
    write_text_atomic,
)
from skipcal.profiles.agreement import check_agreement
from skipcal.profiles.fits import check_fits
from skipcal.profiles.parts import (
    GateInfo,
    GateSettings,
    StaticSettings,
    Tuning,
)
from skipcal.profiles.policies import ProfilePolicies
from skipcal.profiles.sources import PROFILE_FILE, HubOptions, commit_of, fetch, locate, shipped_profiles

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from skipcal.profiles.fixed_sets import FixedSets
    from skipcal.profiles.set_tensors import SetTensors
    from skipcal.profiles.tensors import GateTensors

logger = logging.getLogger(__name__)


class SkipProfile(ProfilePolicies):
    """A saved calibration, and what is done with one: files, hub, policies.

    Its fields are those of `skipcal.profiles.data.ProfileData`, its policies are made in `policies`.
    """

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
        """Write the file atomically, after its tensors, which go beside it under their names.

        Raises OutputExists unless `overwrite` (the same tensors may be there), OutputError if it fails;
        then all files are as they were. Raises ProfileError for a profile that could not be loaded again.
        """
        target = Path(path)
        text = self.checked_json(str(target))
        tensors = {target.parent / name: raw for name, raw in self.tensor_files().items()}
        if tensors:
            check_output(target, overwrite=overwrite, alone=False)
        replaced: dict[Path, bytes | None] = {}
        try:
            for beside, raw in tensors.items():
                before = beside.read_bytes() if beside.is_file() else None
                if before != raw:
                    write_bytes_atomic(beside, raw, overwrite=overwrite)
                    replaced[beside] = before
            write_text_atomic(target, text, overwrite=overwrite)
        except BaseException:
            for beside, before in replaced.items():
                if before is None:
                    remove_output(beside)
                else:
                    beside.write_bytes(before)
            raise

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
        for beside in found.files_beside():  # of the same commit, so that they lie beside the profile
            commit = None if os.path.isdir(name) else commit_of(file) or revision
            fetch(str(name), beside, options, revision=commit, why=", which the profile names,")
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
        from skipcal.profiles.hub import warn_of_older_section, write_card

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
        from skipcal.profiles.hub import push

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

    def with_gate(self, gate: GateInfo, policy: GateSettings, tensors: GateTensors) -> Self:
        """This profile with a gate, whose rule is then its policy."""
        update = {"gate": gate, "policy": policy, "tuning": None, "paper_policy": self.cosine_policy}
        found = self.model_copy(update=update)
        found._tensors = tensors
        return found

    def with_fixed_sets(self, fixed: FixedSets, policy: StaticSettings, tensors: SetTensors) -> Self:
        """This profile with fitted sets, one of which is then its policy."""
        update = {"fixed_sets": fixed, "policy": policy, "tuning": None, "paper_policy": self.cosine_policy}
        found = self.model_copy(update=update)
        found._set_tensors = tensors
        return found

    def with_tuning(self, tuning: Tuning, policy: SkipPolicy | GateSettings | StaticSettings) -> Self:
        """This profile with the policy that a search has chosen."""
        paper = None if is_papers_rule(policy) else self.cosine_policy
        return self.model_copy(update={"tuning": tuning, "policy": policy, "paper_policy": paper})

    # Use

    def check_fits(self, model: PreTrainedModel, *, same_weights: bool | None = None) -> None:
        """Raise ProfileMismatch if `model` has another shape; warn if it has other weights.

        same_weights: raise for other weights too; None: where the policy is a gate, which was fitted to them.
        """
        check_fits(self, model, same_weights=same_weights)
