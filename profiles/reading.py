"""Read a profile's file: its bytes, its JSON, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from skipcal.errors import ProfileError, Unavailable

MAX_PROFILE_BYTES = 64 * 2**20  # 80 layers and 50 corpora take 12 MB; more is no profile


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises Unavailable if it cannot be read, ProfileError if it is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{path} is not a profile: it is larger than {MAX_PROFILE_BYTES >> 20} MiB")
    return raw


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ProfileError for anything else."""
    try:
        data = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where} is not a profile: no valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where} is not a profile: expected an object, got {type(data).__name__}")
    return data


def validation_message(error: Exception) -> str:
    """The first fault that pydantic found, in one line: field, what is wrong, the value."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split())
    first, *rest = error.errors(include_url=False)
    place = [str(part) for part in first["loc"]]
    if place[:1] == ["policy"]:
        del place[1:2]  # the rule, by which pydantic chose among policies
    field = ".".join(place) or "the document"
    value = repr(first.get("input"))
    shown = value if len(value) <= 60 else f"{value[:57]}..."
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {len(rest)} more)" if rest else ""
    return f"{field}: {message}, got {shown}{more}"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
