"""A file that a command was asked for: its name is held while the work goes on, and no result is lost."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import logging
import os
from collections.abc import Callable
from pathlib import Path

from skipcal.errors import OutputExists
from skipcal.files.writing import check_output, followed, is_stream

logger = logging.getLogger(__name__)


class Output:
    """An output's name, from before the work until `release`: a second run that wants it is refused at once.

    The lock goes with the process, however that ends. Where a drive has no locks there is none, and `write`
    alone sees what another run has written.
    """

    def __init__(self, path: Path, *, overwrite: bool, alone: bool = True) -> None:
        """Raise as `check_output` does, and OutputExists while another run holds the name."""
        check_output(path, overwrite=overwrite, alone=alone)
        self.path = path
        self.is_stream = is_stream(path)
        self._lock = None if self.is_stream else _lock_file(followed(path))
        self._descriptor = None if self._lock is None else _locked(self._lock, path)

    def write(self, save: Callable[[Path], object]) -> Path:
        """Let `save` write under the name; returns where that was.

        It is a folder of its own beside the name where something else was written there meanwhile.
        """
        try:
            save(self.path)
            return self.path
        except OutputExists:
            place = _free_folder(self.path) / self.path.name
        save(place)
        logger.warning("%s was written by another run meanwhile; this one's is %s", self.path, place)
        return place

    def release(self) -> None:
        """Let go of the name. A second call does nothing."""
        if self._lock is not None and self._descriptor is not None:
            self._lock.unlink(missing_ok=True)  # before another run can lock it
            os.close(self._descriptor)
            self._descriptor = None


def _lock_file(path: Path) -> Path:
    """Beside the file, so that it is on the same drive; the name itself may be too long to be added to."""
    name = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(f".skipcal-{name}.lock")


def _locked(file: Path, path: Path) -> int | None:
    """A descriptor that holds the lock, None where there are no locks. Raises OutputExists if it is held."""
    while True:
        try:
            descriptor = os.open(file, os.O_RDONLY | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputExists(
                f"{path} is what another run is at work on; wait for it, or name another file"
            ) from error
        except OSError:
            os.close(descriptor)
            return None
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # the run that held it took it away in between


def _free_folder(path: Path) -> Path:
    for number in itertools.count(2):
        folder = path.with_name(f"{path.stem}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("numbers do not end")
