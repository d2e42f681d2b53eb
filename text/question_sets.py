"""Read the items of a task from a file, and refuse what would make a wrong number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from skipcal.errors import Unavailable, first_words
from skipcal.text.local_files import read_records, whole_characters

__all__ = ["hub_commit", "hub_records", "read_records", "text_field", "unique"]


def text_field(record: dict[str, Any], name: str, where: str) -> str:
    """A field that has to hold text."""
    value = record.get(name)
    if isinstance(value, str):
        value = whole_characters(value)
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
