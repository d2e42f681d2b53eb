"""Read a profile's file: its bytes, its JSON, and what is wrong with them in one line.

A profile may come from anyone. Its size is bounded before it is parsed, and so is all that parsing makes
of it; nothing in it is run, and no path in it is followed.
"""

from __future__ import annotations

import codecs
import json
import math
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from reprlib import Repr
from typing import Any

from pydantic import ValidationError

from skipcal.errors import ProfileError, Unavailable

MAX_PROFILE_BYTES = 16 * 2**20  # a layer takes 1 kB for each corpus: 126 layers and 50 corpora, 7 MB
MAX_STRUCTURE = 100_000  # brackets and colons; 126 layers and 50 corpora have 8,000
MAX_OTHERS_BYTES = 2**20  # of all sections but `layers`; the shipped profile has 7 kB of them
MAX_INTEGER = 2**63 - 1  # what tables and tensors can hold
_LARGE_NUMBER = re.compile(rb"\d{19}|[eE]\+?\d{3}")  # without one of these, none has to be looked at
MAX_MESSAGE = 400  # characters of a fault: a key may be a megabyte long

_shorten = Repr()
_shorten.maxstring = _shorten.maxother = _shorten.maxlong = 60
_shorten.maxlevel = 2


def read_bytes(path: Path) -> bytes:
    """The file's content. Raises Unavailable if it cannot be read, ProfileError if it is too large."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise Unavailable(f"{path} cannot be read ({error.strerror})") from error
    if len(raw) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{path} is not a profile: it is larger than {MAX_PROFILE_BYTES >> 20} MiB")
    return raw.removeprefix(codecs.BOM_UTF8)  # which some editors put first


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that a file holds. Raises ProfileError for anything else.

    Refused too is what JSON allows and nobody means: a key twice in one object, a number that is no
    finite float or 64-bit integer, more brackets and colons than any profile has.
    """
    if sum(map(raw.count, (b"{", b"[", b":"))) > MAX_STRUCTURE:
        raise ProfileError(
            f"{where} is not a profile: it has more than {MAX_STRUCTURE:,} entries, which none has"
        )
    try:
        large = _LARGE_NUMBER.search(raw) is not None
        data = json.loads(
            raw.decode("utf-8"),
            parse_constant=_no_constant,
            parse_float=_finite if large else None,
            parse_int=_bounded if large else None,
            object_pairs_hook=_each_key_once,
        )
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"{where} is not a profile: no valid JSON ({one_line(str(error))})") from error
    if not isinstance(data, dict):
        raise ProfileError(f"{where} is not a profile: expected an object, got {type(data).__name__}")
    return data


def check_before_validation(
    data: dict[str, Any], sections: Collection[str], statistics: Collection[str]
) -> None:
    """Raise ValueError for what would take gigabytes to refuse later.

    For each key that an object lacks, pydantic keeps a copy of the object. So the keys (`statistics`) of
    `layers`, which may be large, are looked for here, and all other `sections` are small.
    """
    layers = data.get("layers")
    for name, part in layers.items() if isinstance(layers, dict) else ():
        lacking = [key for key in statistics if key not in part] if isinstance(part, dict) else []
        if lacking:
            raise ValueError(f"layers.{name}: expected an entry {lacking[0]!r}")
    others = {key: data[key] for key in sections if key in data and key != "layers"}
    if len(json.dumps(others)) > MAX_OTHERS_BYTES:
        raise ValueError(f"expected less than {MAX_OTHERS_BYTES >> 20} MiB in all sections but layers")


def validation_message(error: Exception, data: dict[str, Any]) -> str:
    """The first fault that pydantic found in `data`, in one line: field, what is wrong, the value."""
    if not isinstance(error, ValidationError):
        return one_line(str(error))
    # With its inputs, each error would have a copy of what is around it.
    first, *rest = error.errors(include_url=False, include_context=False, include_input=False)
    place = [*first["loc"]]
    if place[:1] == ["policy"]:
        del place[1:2]  # the rule, by which pydantic chose among policies
    message = first["msg"].removeprefix("Value error, ")
    if place:
        message = f"{one_line('.'.join(map(str, place)), 120)}: {message}"
        if ", got " not in message:
            message += f", got {shown(_value_at(data, place))}"
    more = f" (and {len(rest)} more)" if rest else ""
    return one_line(f"{message}{more}")


def _value_at(data: Any, place: Sequence[int | str]) -> Any:
    """What stands there; of what is missing, the part that lacks it."""
    for key in place:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            break
    return data


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
