"""From prompts to traces: every batch is continued and captured once, by one of the processes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from skipcal.calibrate.checkpoint import Checkpoint
from skipcal.calibrate.passes import Passes, progress
from skipcal.calibrate.processes import Processes
from skipcal.calibrate.saturation import Trace
from skipcal.calibrate.trace_store import Held, Part, rows_of
from skipcal.text.corpora import CorpusSample

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """Prompts that run together. They are the same whoever runs them: a batch decides the last digits.

    place: number of the corpus, and of the batch within it. first: number of the first prompt.
    """

    place: tuple[int, int]
    first: int
    prompts: list[list[int]]


def gather(
    passes: Passes,
    samples: Sequence[CorpusSample],
    batch_size: int,
    *,
    processes: Processes,
    checkpoint: Checkpoint | None,
) -> list[Trace]:
    """A trace of each sample. Batches that the checkpoint holds are not run again.

    Several processes need a checkpoint, for process 0 finds there what the others captured.
    """
    planned = _planned(samples, batch_size)
    pending = _pending(planned, processes, checkpoint)
    held = processes.working(lambda: _run(passes, processes.mine(pending), checkpoint, processes.leads))
    processes.agree(lambda: None)  # all parts are there
    return [
        Trace(
            corpus=sample.corpus.name,
            prompt_tokens=passes.prompt_tokens,
            parts=[
                checkpoint.part(*batch.place) if checkpoint else held[batch.place]
                for batch in planned
                if batch.place[0] == corpus
            ],
        )
        for corpus, sample in enumerate(samples)
    ]


def first_rows(trace: Trace, count: int) -> list[list[int]]:
    """The first `count` prompts of a trace with their continuations."""
    rows: list[list[int]] = []
    for part in trace.parts:
        if len(rows) >= count:
            break
        rows += rows_of(part)
    return rows[:count]


def _planned(samples: Sequence[CorpusSample], size: int) -> list[Batch]:
    return [
        Batch((corpus, first // size), first, sample.prompts[first : first + size])
        for corpus, sample in enumerate(samples)
        for first in range(0, len(sample.prompts), size)
    ]


def _pending(planned: list[Batch], processes: Processes, checkpoint: Checkpoint | None) -> list[Batch]:
    """The batches that are still to be run: process 0 looks, so that all divide the same ones."""
    finished: set[tuple[int, int]] = set()
    if checkpoint is not None:
        finished = processes.share(lambda: checkpoint.finished(batch.place for batch in planned))
    pending = [batch for batch in planned if batch.place not in finished]
    if finished and processes.leads:
        logger.warning(
            "going on from %d of %d batches, which were finished before and kept in %s",
            len(finished),
            len(planned),
            checkpoint.folder if checkpoint else None,
        )
    if len(pending) < processes.size and not finished and processes.leads:
        logger.warning(
            "%d processes share %d batches, so some have none; lower --batch-size, or start fewer",
            processes.size,
            len(pending),
        )
    return pending


def _run(
    passes: Passes, mine: list[Batch], checkpoint: Checkpoint | None, shown: bool
) -> dict[tuple[int, int], Part]:
    """Run batches; what is returned is empty where a checkpoint keeps the parts."""
    held: dict[tuple[int, int], Part] = {}
    with progress("calibrate", sum(len(batch.prompts) for batch in mine), shown=shown) as bar:
        for batch in mine:
            part: Held = passes.captured(batch.prompts, batch.first)
            if checkpoint is None:
                held[batch.place] = part
            else:
                checkpoint.keep(*batch.place, part)
            bar.update(len(batch.prompts))
    return held
