"""A folder that is written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from skipcal.errors import OutputError, OutputExists
from skipcal.files.writing import check_output, followed


def check_folder_output(folder: Path, *, overwrite: bool, marker: str) -> None:
    """Raise early when `folder` could not be written at the end of long work.

    A folder with content is replaced only where that was asked for and it holds the file `marker`, by which
    such folders are known: nothing else is ever deleted. Raises OutputExists or OutputError.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file; give the name of a folder with --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / marker).is_file():
            raise OutputExists(f"{folder} holds other files (no {marker}); name another folder")
        if not overwrite:
            raise OutputExists(
                f"{folder} exists already; pass --overwrite to replace it, or name another folder"
            )
    target = followed(folder)
    check_output(target.with_name(f".skipcal-{marker}"), overwrite=True)


def write_folder_atomic(folder: Path, fill: Callable[[Path], None], *, overwrite: bool, marker: str) -> None:
    """Let `fill` write into a folder beside, then give it the name; see `check_folder_output`.

    Whatever interrupts it, a signal too, `folder` keeps what it held.
    """
    check_folder_output(folder, overwrite=overwrite, marker=marker)
    target = followed(folder)
    with tempfile.TemporaryDirectory(prefix=".skipcal-", dir=target.parent) as place:
        made, old = Path(place, "made"), Path(place, "old")
        made.mkdir()
        try:
            fill(made)
            for file in made.rglob("*"):
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        except OSError as error:
            raise OutputError(
                f"{folder} cannot be written ({error.strerror or error}); choose another place with --output"
            ) from error
        check_folder_output(folder, overwrite=overwrite, marker=marker)  # something may be there now
        if target.exists():
            target.rename(old)
        try:
            made.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
