"""What one batch of a calibration leaves: named arrays, in memory or in a file that is read in slices.

ids            [rows, width] int32, the prompts with their continuations, padded at the end
lengths        [rows] int32, tokens of each row
prompt         [tokens] int32, which prompt of the corpus a counted token belongs to
position       [tokens] int32, its place in its row
cosine         [layers, tokens] float32, `cos_i`: one layer is one run of bytes
norm_ratio     [layers, tokens] float32, `‖f_i‖/‖h_i‖`
layer_cosine_sum [layers] float64, over the same tokens, of the cosine between a layer's input and output;
               may be missing
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skipcal.errors import Unavailable, first_words
from skipcal.files.writing import write_atomic

ALL = slice(None)
SUFFIX = ".safetensors"


class Part(Protocol):
    """The arrays of one batch."""

    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name."""

    def read(self, name: str, index: slice = ALL) -> np.ndarray:
        """An array, or a slice of it along its first axis."""

    def length(self, name: str) -> int:
        """The size of an array's first axis."""


@dataclass(frozen=True)
class Held:
    """A part in memory."""

    arrays: dict[str, np.ndarray]

    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name."""
        return name in self.arrays

    def read(self, name: str, index: slice = ALL) -> np.ndarray:
        """A view: whoever writes to it copies it first."""
        return self.arrays[name][index]

    def length(self, name: str) -> int:
        """The size of an array's first axis."""
        return len(self.arrays[name])


@dataclass(frozen=True)
class Stored:
    """A part in a file, of which only what is asked for is read."""

    path: Path

    def __contains__(self, name: str) -> bool:
        """Whether there is an array of that name."""
        with self._open() as file:
            return name in file.keys()  # noqa: SIM118  (a file is no dict)

    def read(self, name: str, index: slice = ALL) -> np.ndarray:
        """A copy. Raises Unavailable when the file is gone or damaged."""
        with self._open() as file:
            values: np.ndarray = file.get_slice(name)[index]
        return values

    def length(self, name: str) -> int:
        """The size of an array's first axis; no value is read."""
        with self._open() as file:
            return int(file.get_slice(name).get_shape()[0])

    def _open(self) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return safe_open(self.path, framework="numpy")
        except (OSError, SafetensorError) as error:
            raise Unavailable(
                f"{self.path}, a finished batch of this run, cannot be read ({first_words(error)}); delete "
                f"{self.path.parent} and give the command again"
            ) from error


def store(part: Held, path: Path) -> Stored:
    """Write a part: a reader sees the whole file or none. Raises OutputError."""
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(values) for name, values in part.arrays.items()}
    write_atomic(path, lambda partial: save_file(arrays, partial), overwrite=True)
    return Stored(path)


def rows_of(part: Part) -> list[list[int]]:
    """The rows of token ids of a part."""
    pairs = zip(part.read("ids").tolist(), part.read("lengths").tolist(), strict=True)
    return [row[:length] for row, length in pairs]


def as_ids(rows: list[list[int]]) -> dict[str, np.ndarray]:
    """`ids` and `lengths` of rows."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for place, row in zip(ids, rows, strict=True):
        place[: len(row)] = row
    return {"ids": ids, "lengths": np.array([len(row) for row in rows], np.int32)}
