"""Write results so that a reader sees the old file or the new one, never a part of one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from skipcal.errors import OutputError, OutputExists

_PARTIAL = ".skipcal-"  # before the names of files that are being written: a name of 255 bytes has no room
_LONGEST_SUFFIX = 16
# Opened by their names, a file that stdout goes to would be written from two places at once.
_STANDARD = {"/dev/stdout": 1, "/dev/stderr": 2}


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


def check_output(path: Path, *, overwrite: bool, alone: bool = True) -> None:
    """Raise early, before long work, when `path` could not be written at its end.

    The folder is made if it is missing. alone: False where another file goes beside it, so that it has to
    be a file itself. Raises OutputExists or OutputError.
    """
    with _output_errors(path):
        if path.is_dir():
            raise OutputError(f"{path} is a folder; give the name of a file")
        if is_stream(path):
            if not alone:
                raise OutputError(f"{path} is no file, and another goes beside it; give the name of a file")
            return
        if path.exists() and not overwrite:
            raise OutputExists(_exists(path))
        target = followed(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # A probe says more than os.access: the file system may be read-only, or full.
        descriptor, probe = tempfile.mkstemp(prefix=_PARTIAL, dir=target.parent)
        os.close(descriptor)
        os.unlink(probe)


def write_atomic(path: Path, write: Callable[[Path], None], *, overwrite: bool) -> None:
    """Let `write` fill a temporary file beside `path`, then give it that name.

    Whatever interrupts it, a signal too, `path` keeps what it held and the temporary file goes. A link stays
    one, and what it leads to is written. A device or a pipe is given the content and stays what it is.
    """
    check_output(path, overwrite=overwrite)
    with _output_errors(path):
        if is_stream(path):
            _pour(write, path)
            return
        target = followed(path)
        # The suffix stays at the end: picture writers choose the format by it.
        suffix = target.suffix[:_LONGEST_SUFFIX]
        descriptor, name = tempfile.mkstemp(prefix=_PARTIAL, suffix=suffix, dir=target.parent)
        os.close(descriptor)
        partial = Path(name)
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.chmod(target.stat().st_mode & 0o7777 if target.exists() else 0o666 & ~_umask())
            if overwrite:
                partial.replace(target)
            else:
                _link(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def followed(path: Path) -> Path:
    """The file that a path leads to, there already or not. Raises OutputError for links in a circle."""
    if not path.is_symlink():
        return path
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        raise OutputError(f"{path} is a link that leads to itself; give the name of a file")
    return target


def is_stream(path: Path) -> bool:
    """Whether it is a device, a pipe or what stands for stdout: nothing is replaced by writing there.

    Raises OutputError for a disk or a socket.
    """
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if stat.S_ISBLK(mode) or stat.S_ISSOCK(mode):
        raise OutputError(f"{path} is a disk or a socket; give the name of a file")
    return str(path) in _STANDARD or stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)


def remove_output(path: Path) -> None:
    """Delete an output if it is there; a link to it stays."""
    with _output_errors(path):
        followed(path).unlink(missing_ok=True)


def _pour(write: Callable[[Path], None], stream: Path) -> None:
    """Write into a file elsewhere, and when it is whole, its content into the stream."""
    descriptor = _STANDARD.get(str(stream))
    with tempfile.TemporaryDirectory(prefix="skipcal-") as folder:
        made = Path(folder, f"made{stream.suffix[:_LONGEST_SUFFIX]}")
        write(made)
        with (
            made.open("rb") as source,
            open(stream if descriptor is None else descriptor, "wb", closefd=descriptor is None) as out,
        ):
            shutil.copyfileobj(source, out)


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
