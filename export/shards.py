"""Safetensors files: which tensors they hold, and copies without some of them.

A copy moves bytes from file to file and makes no tensor of them: it is exact in any dtype, and takes no
memory. The format is an eight-byte length, a JSON header with the place of each tensor, and the bytes of all.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from skipcal.arch.source import Source, unavailable
from skipcal.errors import Unavailable, first_words

_BLOCK = 2**24  # bytes that are copied at a time


@dataclass(frozen=True)
class Shard:
    """One file of a checkpoint. name: as the checkpoint calls it; tensors: their names."""

    name: str
    path: Path
    tensors: tuple[str, ...]


def shards_of(source: Source) -> list[Shard]:
    """The weights of a checkpoint, from a folder or the hub.

    Raises Unavailable where there are none in safetensors, or where they cannot be had.
    """
    if _file(source, SAFE_WEIGHTS_NAME, required=False) is not None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        index = _file(source, SAFE_WEIGHTS_INDEX_NAME, required=False)
        if index is None:
            raise Unavailable(
                f"model {source.name!r} has no weights in safetensors ({SAFE_WEIGHTS_NAME}), of which an "
                "export is made; save it so with save_pretrained(), and give that folder with --model"
            )
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    found = []
    for name in names:
        path = _file(source, name)
        assert path is not None
        try:
            with safe_open(path, framework="pt") as file:
                found.append(Shard(name, path, tuple(file.keys())))
        except SafetensorError as error:
            raise Unavailable(f"{path} is no safetensors file ({first_words(error)})") from error
    return found


def copied_file(source: Source, name: str, folder: Path) -> None:
    """Copy a file of the checkpoint as it is, if there is such a one."""
    path = _file(source, name, required=False)
    if path is not None:
        shutil.copyfile(path, folder / name)


def _file(source: Source, name: str, *, required: bool = True) -> Path | None:
    try:
        path = cached_file(
            source.place, name, revision=source.revision, _raise_exceptions_for_missing_entries=required
        )
    except OSError as error:
        raise unavailable(source, error) from error
    return None if path is None else Path(os.path.realpath(path))  # in the hub's cache it is a link


def copy_of(shard: Shard, target: Path, kept: Collection[str]) -> bool:
    """Make `target` the same file with the tensors `kept` alone. Returns whether it is the very same: a link.

    Where all are kept and the file system can, both names stand for one file, and no byte is copied.
    """
    if set(shard.tensors) <= set(kept):
        try:
            os.link(shard.path, target)
        except OSError:  # another drive, or one without links
            shutil.copyfile(shard.path, target)
            return False
        return True
    with shard.path.open("rb") as file, target.open("wb") as out:
        (length,) = struct.unpack("<Q", file.read(8))
        places: dict[str, Any] = json.loads(file.read(length))
        header: dict[str, Any] = {k: v for k, v in places.items() if k == "__metadata__"}
        begin, end = 8 + length, 0
        chosen = sorted((places[name]["data_offsets"], name) for name in shard.tensors if name in kept)
        for (first, last), name in chosen:
            header[name] = {**places[name], "data_offsets": [end, end + last - first]}
            end += last - first
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)  # tensors begin at multiples of eight
        out.write(struct.pack("<Q", len(raw)) + raw)
        for (first, last), _ in chosen:
            file.seek(begin + first)
            _pour(file, out, last - first)
    return False


def _pour(file: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise Unavailable(f"{file.name} ends before its tensors do; get it anew")
        out.write(block)
        size -= len(block)
