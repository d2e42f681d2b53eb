"""Local text: a file as a whole or record by record, compressed or not. A path is never a pattern."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

from skipcal.errors import Unavailable, first_words

TEXT_SUFFIXES = (".txt",)
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}  # by ending, the module that reads it


def ending(path: Path) -> str:
    """What a file's name says it is, in lower case: `.jsonl` for `A.JSONL` and `a.jsonl.gz`."""
    last = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if last in COMPRESSIONS else ""
    # Parquet is compressed inside.
    return inner if inner in (*TEXT_SUFFIXES, ".jsonl", ".json") else last


def stem(path: Path) -> str:
    """The file's name without what `ending` says of it."""
    return path.stem if ending(path) == path.suffix.lower() else Path(path.stem).stem


def open_text(path: Path) -> TextIO:
    """The file as UTF-8 text, without the byte-order mark that some editors put first."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    if compression is None:
        return path.open(encoding="utf-8-sig")
    opened: TextIO = import_module(compression).open(path, "rt", encoding="utf-8-sig")
    return opened


def read_text(path: Path, characters: int = -1) -> str:
    """The file's text, or so many characters of it. Raises Unavailable where it is none."""
    try:
        with open_text(path) as file:
            text = file.read(characters)
    except Exception as error:  # what the decompressors raise
        raise unreadable(path, error) from error
    if "\0" in text:
        raise Unavailable(f"{path} is binary, not text; pass a UTF-8 text file")
    return text


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each record of a table with its place, for messages. JSON is one record a line, or one array.

    Raises Unavailable for a file that is not there or not of that kind.
    """
    read = _parquet if ending(path) == ".parquet" else _json
    try:
        yield from read(path)
    except Unavailable:
        raise
    except Exception as error:  # what pyarrow and the decompressors raise, for there is no common class
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> Unavailable:
    """What to say of a file that could not be read, whatever was wrong."""
    if isinstance(error, UnicodeDecodeError):
        return Unavailable(f"{path} is not UTF-8 text (byte {error.start}); pass a text file")
    if isinstance(error, OSError) and error.strerror:
        return Unavailable(f"{path} cannot be read ({error.strerror}); check the path")
    if path.suffix.lower() in COMPRESSIONS and isinstance(error, OSError | EOFError | zlib.error):
        return Unavailable(f"{path} could not be read: it is not what {path.suffix} says, or is cut off")
    return Unavailable(f"{path} could not be read ({first_words(error)}); check the file")


def whole_characters(text: str) -> str:
    """The text with a question mark for half of a surrogate pair, which has no encoding."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    # Opened here, for pyarrow takes no name whose bytes are no UTF-8.
    with path.open("rb") as raw, pq.ParquetFile(raw) as file:
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", row


def _json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open_text(path) as file:
        values: Iterable[tuple[str, Any]]
        lines = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        first = next(lines, None)
        if first is None:
            return
        if first[1].lstrip().startswith("["):
            array = _parsed("".join([first[1], *(line for _, line in lines)]))
            values = [(f"{path}, entry {n}", value) for n, value in enumerate(array or [], start=1)]
            if array is None:
                raise Unavailable(f"{path} is no valid JSON; check the file")
        else:
            values = ((f"{path}:{number}", _parsed(line)) for number, line in chain([first], lines))
        for where, value in values:
            if not isinstance(value, dict):
                raise Unavailable(
                    f"{where} is no JSON object; expected one record a line, or an array of them"
                )
            yield where, value


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
