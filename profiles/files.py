"""Write results so that a reader sees the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skipcal.errors import OutputError, OutputExists


def dump_json(value: Any) -> str:
    """JSON with sorted keys, one line for an array of plain numbers, and a trailing newline.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    # Only indentation has raw newlines, so nothing inside a string matches.
    numbers = re.compile(r"\[\n\s+-?\d[\d.eE+-]*(?:,\s+-?\d[\d.eE+-]*)*\s+\]")
    return (
        numbers.sub(lambda match: " ".join(match[0].split()).replace("[ ", "[").replace(" ]", "]"), text)
        + "\n"
    )


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise early, before long work, when `path` could not be written at its end.

    The folder is made if it is missing. Raises OutputExists or OutputError.
    """
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file")
    if path.exists() and not overwrite:
        raise OutputExists(_exists(path))
    with _output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A probe says more than os.access: the file system may be read-only, or full.
        descriptor, probe = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(descriptor)
        os.unlink(probe)


def write_atomic(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill a temporary file beside `path`, then give it that name.

    Whatever interrupts it, a signal too, `path` keeps what it held and the temporary file goes.
    """
    check_output(path, overwrite=overwrite)
    with _output_errors(path):
        # The suffix stays at the end: picture writers choose the format by it.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=path.suffix, dir=path.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(0o666 & ~_umask())
            if overwrite:
                partial.replace(path)
            else:
                _link(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write_bytes_atomic(path: Path, raw: bytes, *, overwrite: bool) -> None:
    """Write `raw` as it is; see `write_atomic`."""

    def write(partial: Path) -> None:
        partial.write_bytes(raw)

    write_atomic(path, write, overwrite=overwrite)


def write_text_atomic(path: Path, text: str, *, overwrite: bool) -> None:
    """Write `text` as UTF-8, its line ends as they are; see `write_atomic`."""
    write_bytes_atomic(path, text.encode("utf-8"), overwrite=overwrite)


def _link(partial: Path, path: Path) -> None:
    """Name the file; unlike a rename it fails if the name was taken meanwhile."""
    try:
        os.link(partial, path)
    except FileExistsError as error:
        raise OutputExists(_exists(path)) from error
    except OSError:  # network and FUSE drives may lack links
        if path.exists():
            raise OutputExists(_exists(path)) from None
        partial.rename(path)


def _exists(path: Path) -> str:
    return f"{path} exists already; pass --overwrite to replace it, or name another file"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path} cannot be written ({error.strerror or error}); choose another place with --output"
        ) from error
