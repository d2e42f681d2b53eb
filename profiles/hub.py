"""Share a profile: its section of a model card, and a repository on the hub."""

from __future__ import annotations

import logging
import re
import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from skipcal.errors import ConfigError, OutputError, SkipcalError, Unavailable, first_words
from skipcal.files.markdown import escaped
from skipcal.files.writing import write_bytes_atomic, write_text_atomic
from skipcal.profiles.card import FIGURE_FILE, card_section
from skipcal.profiles.sources import HUB_ID, PROFILE_FILE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from skipcal.profiles.data import ProfileData

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
BEGIN = "<!-- skipcal profile: made by skipcal, changes inside are lost -->"
END = "<!-- end of skipcal profile -->"


def with_section(card: str, section: str) -> str:
    """A model card with the section between skipcal's marks: in place of the older one, or at its end.

    Every character outside the marks stays. Raises ConfigError where the marks are not a pair.
    """
    newline = "\r\n" if "\r\n" in card else "\n"
    marked = f"{BEGIN}\n{section.rstrip()}\n{END}".replace("\n", newline)
    begins, ends = card.count(BEGIN), card.count(END)
    if not begins and not ends:
        gap = "" if not card or card.endswith(newline * 2) else newline * (1 if card.endswith(newline) else 2)
        return f"{card}{gap}{marked}{newline}"
    start, stop = card.find(BEGIN), card.find(END)
    if (begins, ends) != (1, 1) or stop < start:
        raise ConfigError(
            f"{CARD_FILE} has {begins} marks {BEGIN!r} and {ends} marks {END!r}, expected one of each, in "
            "this order; mend it, or leave the model card out"
        )
    return card[:start] + marked + card[stop + len(END) :]


def new_card(profile: ProfileData) -> str:
    """The model card of a repository that has none yet: metadata and a title."""
    from huggingface_hub import ModelCardData

    name = profile.model.name
    data = ModelCardData(
        base_model=name if HUB_ID.fullmatch(name) else None,
        library_name="skipcal",
        tags=["skipcal", "ffn-skip"],
    )
    return f"---\n{data.to_yaml()}\n---\n\n# Skip profile of {escaped(name)}\n"


def write_card(profile: ProfileData, folder: Path) -> None:
    """Write the section into README.md of a folder, and the figure beside it."""
    path = folder / CARD_FILE
    card = _read_card(path) if path.exists() else new_card(profile)
    text = with_section(card, card_section(profile, PROFILE_FILE))
    write_bytes_atomic(folder / FIGURE_FILE, figure_bytes(profile), overwrite=True)
    write_text_atomic(path, text, overwrite=True)


def warn_of_older_section(profile: ProfileData, folder: Path) -> None:
    """Say so when README.md of a folder tells of another profile than the one just written."""
    path = folder / CARD_FILE
    try:
        card = _read_card(path) if path.is_file() else ""
        shown = re.search(r"^\$ skipcal show (\S+)\s*$", card[card.find(BEGIN) :], re.M)
        section = card_section(profile, shlex.split(shown[1])[0]) if shown else ""
        older = BEGIN in card and with_section(card, section) != card
    except (ConfigError, Unavailable, ValueError):  # nothing that skipcal wrote
        return
    if older:
        logger.warning("%s tells of another profile; write its section anew with model_card=True", path)


def figure_bytes(profile: ProfileData) -> bytes:
    """The saturation curve as a PNG."""
    from skipcal.profiles.curve import save_figure

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / FIGURE_FILE
        save_figure(profile, path, overwrite=False)
        return path.read_bytes()


def shared_files(profile: ProfileData, *, figure: bool) -> dict[str, bytes]:
    """What is uploaded, but for the model card, by its name in the repository."""
    files = {PROFILE_FILE: profile.checked_json(PROFILE_FILE).encode()}
    files |= profile.tensor_files()
    if figure:
        files[FIGURE_FILE] = figure_bytes(profile)
    return files


def push(
    profile: ProfileData,
    repo_id: str,
    *,
    private: bool | None,
    token: bool | str | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    commit_description: str | None,
    model_card: bool,
) -> str:
    """See `SkipProfile.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd, HfApi

    files = shared_files(profile, figure=model_card)  # all that can fail here fails before anything is sent
    api = HfApi(token=token)
    try:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        _check_visibility(api, repository, private)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repository, branch=revision, exist_ok=True)
        if model_card:
            card = _card_of(api, repository, revision) or new_card(profile)
            source = repository if revision is None else f"{repository}@{revision}"
            files[CARD_FILE] = with_section(card, card_section(profile, source)).encode()
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=raw) for name, raw in files.items()],
            commit_message=commit_message or f"Skip profile of {profile.model.name}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    except SkipcalError:
        raise
    except Exception as error:  # from no network to a refused token: there are dozens of classes
        raise OutputError(
            f"the profile could not be pushed to {repo_id!r} ({type(error).__name__}: {first_words(error)}); "
            "check the name, the network and your access token (hf auth login)"
        ) from error
    return str(commit.pr_url or commit.commit_url)


def _check_visibility(api: HfApi, repository: str, private: bool | None) -> None:
    """Refuse what the hub would pass over: a repository that is there and not as private as asked."""
    found = private if private is None else api.repo_info(repository).private
    if found != private:
        names = {True: "private", False: "public"}
        raise ConfigError(
            f"{repository} is there already and is {names[bool(found)]}, not {names[bool(private)]}; nothing "
            "was uploaded. Change it in its settings on the hub, or do not ask for it"
        )


def _card_of(api: HfApi, repository: str, revision: str | None) -> str | None:
    """README.md of a repository, None if it has none."""
    if not api.file_exists(repository, CARD_FILE, revision=revision):
        return None
    return _read_card(Path(api.hf_hub_download(repository, CARD_FILE, revision=revision)))


def _read_card(path: Path) -> str:
    """Its text with its own ends of lines. Raises Unavailable where it is none."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unavailable(
            f"{path} is not UTF-8 text (byte {error.start}), so no section can be written into it; mend it, "
            "or leave the model card out"
        ) from error
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror})") from error
