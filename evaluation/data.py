"""Read the items of a task from a file, and refuse what would make a wrong number."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from skipcal.errors import Unavailable, first_words


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a .jsonl or .parquet file with its place, for messages.

    Raises Unavailable for a file that is not there or not of that kind.
    """
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            for number, row in enumerate(pq.read_table(path).to_pylist(), start=1):
                yield f"{path}, row {number}", row
            return
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() also splits at U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or first_words(error)
        raise Unavailable(f"{path} cannot be read ({reason}); check the path") from error
    except Exception as error:  # what pyarrow raises for a damaged file
        raise Unavailable(f"{path} is no Parquet file ({first_words(error)})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Unavailable(f"{path}:{number} is no JSON object; expected one record a line")
        yield f"{path}:{number}", value


def text_field(record: dict[str, Any], name: str, where: str) -> str:
    """A field that has to hold text."""
    value = record.get(name)
    if isinstance(value, str) and not value.isascii():
        value = value.encode("utf-8", "replace").decode("utf-8")  # half of a surrogate pair has no encoding
    if not isinstance(value, str) or not value.strip():
        fields = ", ".join(sorted(record)) or "none"
        raise Unavailable(f"{where}: expected text in field {name!r}, got {value!r} (fields: {fields})")
    return value


def unique(items: dict[str, Any], key: str, where: str) -> str:
    """`key`, or an error if an item has it already."""
    if key in items:
        raise Unavailable(f"{where}: the id {key!r} stands there twice; every item needs an id of its own")
    return key


def hub_commit(name: str) -> str | None:
    """The commit a hub data set is at now: it is read at that commit, and recorded."""
    try:
        from huggingface_hub import HfApi

        return HfApi().dataset_info(name).sha
    except Exception as error:
        raise Unavailable(_unreadable(name, error)) from error


def hub_records(name: str, config: str | None, split: str, commit: str | None) -> Iterator[dict[str, Any]]:
    """Records of a hub data set, streamed."""
    try:
        from datasets import load_dataset

        yield from load_dataset(name, config, split=split, revision=commit, streaming=True)
    except Exception as error:  # there are dozens of classes
        raise Unavailable(_unreadable(name, error)) from error


def _unreadable(name: str, error: Exception) -> str:
    return (
        f"data set {name!r} could not be read ({type(error).__name__}: {first_words(error)}); check the "
        "network, or pass a local file with --data-files TASK=PATH"
    )
