"""What a calibration has finished so far, kept in a folder until its profile is written.

A run that was killed goes on from there when the same command is given again. The folder's name is a
digest of all that decides the numbers, so nothing is ever taken from a run with other settings, another
model or other text; it may be of another number of processes, for the batches are the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipcal.calibrate.trace_store import SUFFIX, Held, Stored, store
from skipcal.errors import ConfigError
from skipcal.files.writing import dump_json, write_text_atomic

logger = logging.getLogger(__name__)

CHECKPOINT_FORMAT = "skipcal.calibration/1"
_SETTINGS, _MEASURED = "settings.json", "measured.json"


@dataclass(frozen=True)
class Checkpoint:
    """Finished batches and measurements of one calibration.

    Writing is atomic: what a kill leaves half-written has another name and is never read.
    """

    folder: Path
    resumed: bool = False  # whether an earlier run left something here
    measured: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def open(cls, root: Path, settings: dict[str, Any]) -> Checkpoint:
        """The folder of these settings below `root`, made if it is missing, with what was measured.

        Raises OutputError where it cannot be made.
        """
        text = dump_json({"format": CHECKPOINT_FORMAT, **settings})
        folder = root / hashlib.sha256(text.encode()).hexdigest()[:16]
        if not (folder / _SETTINGS).exists():
            try:
                write_text_atomic(folder / _SETTINGS, text, overwrite=True)
            except BaseException:
                _remove_if_empty(folder, root)
                raise
        others = sum(1 for path in root.iterdir() if path != folder)
        if others:
            logger.warning(
                "%s also holds unfinished work of %d runs with other settings; delete what is not needed",
                root,
                others,
            )
        measured: dict[str, list[int]] = {}
        with contextlib.suppress(OSError, ValueError):
            measured = json.loads((folder / _MEASURED).read_text(encoding="utf-8"))
        return cls(folder, _parts(folder) != [], measured)

    def check_visible(self, rank: int) -> None:
        """Raise ConfigError in a process that does not see the folder, as on another machine's own disk."""
        if not (self.folder / _SETTINGS).exists():
            raise ConfigError(
                f"process {rank} does not see {self.folder}; put --output on a disk that all machines share"
            )

    def part(self, corpus: int, batch: int) -> Stored:
        """Where the part of a corpus's batch is, or will be."""
        return Stored(self.folder / f"{corpus:03}-{batch:06}{SUFFIX}")

    def finished(self, batches: Iterable[tuple[int, int]]) -> set[tuple[int, int]]:
        """Those of the (corpus, batch) pairs whose part is there."""
        return {pair for pair in batches if self.part(*pair).path.exists()}

    def keep(self, corpus: int, batch: int, part: Held) -> None:
        """Write a finished part."""
        store(part, self.part(corpus, batch).path)

    def keep_measured(self, name: str, counts: tuple[int, ...]) -> None:
        """Write what was measured under a policy."""
        self.measured[name] = list(counts)
        write_text_atomic(self.folder / _MEASURED, dump_json(self.measured), overwrite=True)

    def remove(self) -> None:
        """Delete the folder, when its profile is written; also the one above it when that is empty."""
        shutil.rmtree(self.folder, ignore_errors=True)
        _remove_if_empty(self.folder.parent)

    def remove_if_unused(self) -> None:
        """Delete the folder unless it holds a finished part."""
        if not _parts(self.folder):
            self.remove()


def _remove_if_empty(*folders: Path) -> None:
    with contextlib.suppress(OSError):  # one that is not empty, or is no more, ends this
        for folder in folders:
            folder.rmdir()


def _parts(folder: Path) -> list[Path]:
    return list(folder.glob(f"[0-9]*{SUFFIX}"))  # a file that is being written begins with a dot
