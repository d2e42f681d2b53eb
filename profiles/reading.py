"""Read a profile's file: its bytes, its JSON, and what is wrong with them in one line.

A profile may come from anyone. Its size is bounded before it is parsed, and so is all that parsing makes
of it; nothing in it is run, and no path in it is followed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from skipcal.errors import ProfileError, Unavailable

MAX_PROFILE_BYTES = 16 * 2**20  # a layer takes 1 kB for each corpus: 126 layers and 50 corpora, 7 MB
MAX_STRUCTURE = 100_000  # brackets and colons; 126 layers and 50 corpora have 8,000
MAX_INTEGER = 2**63 - 1  # what tables and tensors can hold
_LARGE_NUMBER = re.compile(rb"\d{19}|[eE]\+?\d{3}")  # without one of these, none has to be looked at
MAX_MESSAGE = 400  # characters of a fault: a key may be a megabyte long

_shorten = Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60
_shorten.maxlevel = 2


def read_bytes(path: Path, what: str = "a profile") -> bytes:
    """The file's content. Raises Unavailable if it cannot be read, ProfileError if it is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{path} is not {what}: it is larger than {MAX_PROFILE_BYTES >> 20} MiB")
    return raw


def parse_object(raw: bytes, where: str, what: str = "a profile") -> dict[str, Any]:
    """The JSON object that a file holds. Raises ProfileError for anything else.

    Refused too is what JSON allows and nobody means: a key twice in one object, a number that is no
    finite float or 64-bit integer, more brackets and colons than any profile has.
    """
    if sum(map(raw.count, (b"{", b"[", b":"))) > MAX_STRUCTURE:
        raise ProfileError(
            f"{where} is not {what}: it has more than {MAX_STRUCTURE:,} entries, which none has"
        )
    try:
        numbers: dict[str, Callable[[str], Any]] = {}
        if _LARGE_NUMBER.search(raw):
            numbers = {"parse_float": _finite, "parse_int": _bounded}
        data = json.loads(
            raw.decode("utf-8"),
            parse_constant=_no_constant,
            object_pairs_hook=_each_key_once,
            **numbers,
        )
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where} is not {what}: no valid JSON ({one_line(str(error))})") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where} is not {what}: expected an object, got {type(data).__name__}")
    return data


def validation_message(error: Exception) -> str:
    """The first fault that pydantic found, in one line: field, what is wrong, the value."""
    if not isinstance(error, ValidationError):
        return one_line(str(error))
    first, *rest = error.errors(include_url=False, include_context=False)
    place = [str(part) for part in first["loc"]]
    if place[:1] == ["policy"]:
        del place[1:2]  # the rule, by which pydantic chose among policies
    message = first["msg"].removeprefix("Value error, ")
    if place:
        message = f"{one_line('.'.join(place), 120)}: {message}"
        if ", got " not in message:
            message += f", got {shown(first.get('input'))}"
    more = f" (and {len(rest)} more)" if rest else ""
    return one_line(f"{message}{more}")


def shown(value: Any) -> str:
    """A value as a message shows it: its repr, cut to a few dozen characters."""
    return one_line(_shorten.repr(value), 80)


def one_line(text: str, limit: int = MAX_MESSAGE) -> str:
    """The text in one line of at most about `limit` characters that a terminal only shows."""
    words = " ".join(text[: 2 * limit].split())
    return printable(words if len(words) <= limit else f"{words[:limit]} ...")


def printable(text: str) -> str:
    """The text without what a terminal would obey, or hide: control and direction characters."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is no finite number")
    return value


def _bounded(digits: str) -> int:
    # Python converts no more than 4300 digits, but it would take them.
    if len(digits) > 20 or not -MAX_INTEGER <= (value := int(digits)) <= MAX_INTEGER:
        raise ValueError(f"{shown(digits)} is no 64-bit integer")
    return value


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} is there twice")
        found[key] = value
    return found
