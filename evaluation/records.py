"""Results item by item: a JSONL file that an interruption can end anywhere and a restart goes on with.

The first line is a header that says what made the records; each further line is one record with
an `id`. A record is appended when it is done and never changed. The last line may be cut off by a
kill: it is dropped on reading, and its item is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from skipcal.errors import ConfigError, OutputError

RECORDS_FORMAT = "skipcal.records/1"


class RecordFile:
    """Append-only records of one run. `done` holds those on disk, by id, in the order they were made.

    header: everything that decides the records' content. A file with records that were made under
    another header is refused: they must never be mixed with new ones.
    Raises ConfigError for a foreign or different file, OutputError where it cannot be written.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open `path`, made if missing; read what it holds."""
        self.path = path
        self.header = {"format": RECORDS_FORMAT, **json.loads(json.dumps(header))}
        self.done: dict[str, dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise OutputError(f"{path} cannot be used for records ({error.strerror})") from error
        *lines, rest = content.split(b"\n")
        if lines:
            self._read(lines)
        elif not _as_line(self.header).startswith(rest):  # a foreign file that has no line end
            raise self._foreign()
        if not self.done and lines != [_as_line(self.header).rstrip(b"\n")]:
            self._truncate(0)
            self._write_lines(self.header)
        elif rest:  # what a kill left of a line
            self._truncate(len(content) - len(rest))

    def append(self, *records: dict[str, Any]) -> None:
        """Write finished records. They are on disk when this returns."""
        for record in records:
            if record["id"] in self.done:
                raise ValueError(f"record {record['id']!r} was written before")
        self._write_lines(*records)
        self.done |= {record["id"]: record for record in records}

    def _read(self, lines: list[bytes]) -> None:
        found = _object(lines[0])
        if found is None or found.get("format") != RECORDS_FORMAT:
            raise self._foreign()
        for number, line in enumerate(lines[1:], start=2):
            record = _object(line)
            if record is None or not isinstance(record.get("id"), str):
                raise ConfigError(
                    f"{self.path}:{number}: expected a JSON object with 'id'; the file is damaged: "
                    "delete that line, or name another output"
                )
            if record["id"] in self.done:
                raise ConfigError(f"{self.path}:{number}: the id {record['id']!r} stands there twice")
            self.done[record["id"]] = record
        different = sorted(k for k in {*found, *self.header} if found.get(k) != self.header.get(k))
        if different and self.done:  # without records, as when the first request failed, nothing is lost
            name = different[0]
            raise ConfigError(
                f"{self.path} was made with {name} {found.get(name)!r}, now it is {self.header.get(name)!r}; "
                "name another output, or pass --overwrite to start over"
            )

    def _foreign(self) -> ConfigError:
        return ConfigError(f"{self.path} holds no skipcal records; name another output")

    def _truncate(self, size: int) -> None:
        try:
            with self.path.open("ab") as file:
                file.truncate(size)
        except OSError as error:
            raise OutputError(f"{self.path} cannot be written ({error.strerror})") from error

    def _write_lines(self, *values: dict[str, Any]) -> None:
        lines = b"".join(map(_as_line, values))
        try:
            with self.path.open("ab") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error.strerror}); finished records are kept"
            ) from error


def digest(value: Any) -> str:
    """A short name for settings: equal ones have the same, others another."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _as_line(value: dict[str, Any]) -> bytes:
    line = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        return line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, as a cut answer can end with
        return (json.dumps(value, sort_keys=True, allow_nan=False) + "\n").encode()


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
