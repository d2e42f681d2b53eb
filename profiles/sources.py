"""Where a profile is: a file, a folder, a name that is shipped, or a repository on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TypedDict

from skipcal.arch.embedded import EMBEDDED_MODEL
from skipcal.errors import ConfigError, Unavailable, first_words, suggestion

PROFILE_FILE = "skip_profile.json"  # its name inside a model folder or hub repository
HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class HubId:
    """A repository on the hub, at a branch, tag or commit."""

    name: str
    revision: str | None = None


class HubOptions(TypedDict):
    """How a file of the hub is fetched: what `from_pretrained` in transformers takes besides a revision."""

    token: bool | str | None
    cache_dir: str | Path | None
    subfolder: str
    force_download: bool
    local_files_only: bool


def locate(source: str | Path) -> Path | HubId:
    """The file of a profile, or the repository it is in.

    Tried in this order: a file; a folder with `skip_profile.json`; the name of a shipped profile; a hub
    id, `org/name` or `org/name@revision`. Raises Unavailable when it is none of these.
    """
    if os.path.isfile(source):
        return Path(source)
    if os.path.isdir(source):
        inside = Path(source) / PROFILE_FILE
        if inside.is_file():
            return inside
        raise Unavailable(
            f"folder {str(source)!r} has no {PROFILE_FILE}; give a profile's file, or make one with: "
            "skipcal profile"
        )
    if isinstance(source, str):
        if source in shipped_profiles():
            return Path(str(resources.files("skipcal.profiles"))) / f"{source}.json"
        found = HUB_ID.fullmatch(source)
        if found and not source.endswith(".json"):  # which is a file that is not there
            return HubId(found["name"], found["revision"])
    raise Unavailable(
        f"{str(source)!r} is no file and no shipped profile ({suggestion(str(source), shipped_profiles())}), "
        f"no folder with {PROFILE_FILE} and no hub id (org/name or org/name@revision); make one with: "
        "skipcal profile"
    )


def fetch(name: str, file: str, options: HubOptions, *, revision: str | None = None, why: str = "") -> Path:
    """The file of a folder or hub repository, from the cache or downloaded into it.

    Links are followed: in the hub's cache every file is one. What a profile names is checked by its sha256.
    Raises Unavailable when it cannot be had, ConfigError for a revision of a local folder.
    """
    if revision is not None and os.path.isdir(name):
        raise ConfigError(
            f"revision {revision!r} has no effect: {name!r} is a folder here, and folders have none; leave "
            "it out, or go where no such folder is"
        )
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file, revision=revision, **options)
    except Exception as error:  # from no network to a refused token: there are dozens of classes
        at = f"{name!r}" if revision is None else f"{name!r} at revision {revision!r}"
        raise Unavailable(f"no {file}{why} could be had from {at}: {first_words(error)}") from error
    return Path(str(found))


def commit_of(file: Path) -> str | None:
    """The commit of a file in the hub's cache, None for a file elsewhere."""
    found = re.findall(r"/snapshots/([0-9a-f]{40})/", file.as_posix())
    return found[-1] if found else None


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
