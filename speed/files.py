"""Result files of `skipcal bench`: what they are called inside, and how one is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from skipcal.errors import ProfileError, Unavailable
from skipcal.files.reading import MAX_PROFILE_BYTES

BENCH_FORMAT: Literal["skipcal.bench/1"] = "skipcal.bench/1"


def load_result(path: Path) -> dict[str, Any]:
    """A file of `skipcal bench`. Raises Unavailable, or ProfileError for another format."""
    try:
        if path.stat().st_size > MAX_PROFILE_BYTES:
            raise ProfileError(f"result {path} is too large to be one; make one with skipcal bench -o FILE")
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Unavailable(f"result {path} cannot be read ({error.strerror}); check the path") from error
    except ProfileError:
        raise
    except (ValueError, RecursionError) as error:
        raise ProfileError(f"result {path} is no valid JSON ({error})") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != BENCH_FORMAT:
        raise ProfileError(
            f"result {path}: format {found!r}, expected {BENCH_FORMAT!r}; make one with skipcal bench -o FILE"
        )
    result: dict[str, Any] = document
    return result


def is_result(path: Path) -> bool:
    """Whether a file says that it is a result of `skipcal bench`."""
    try:
        load_result(path)
    except (ProfileError, Unavailable):
        return False
    return True
