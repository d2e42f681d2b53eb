"""Batches over processes and checkpoints: each is run once, and traces hold them in order."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipcal.calibrate.checkpoint import Checkpoint
from skipcal.calibrate.gather import first_rows, gather
from skipcal.calibrate.processes import Processes
from skipcal.calibrate.saturation import Trace
from skipcal.calibrate.trace_store import Held, as_ids
from skipcal.text.corpora import Corpus, CorpusSample

LAYERS, LENGTH = 3, 4


class Recorded:
    """In place of a model: a row's cosines are made of its tokens, and who ran what is kept."""

    prompt_tokens = 2

    def __init__(self) -> None:
        self.ran: list[tuple[int, list[list[int]]]] = []

    def captured(self, prompts: list[list[int]], first: int) -> Held:
        self.ran.append((first, prompts))
        ids = np.array(prompts)
        values = np.stack([ids.ravel() / 1000 + layer / 10 for layer in range(LAYERS)]).astype(np.float32)
        return Held(
            {
                **as_ids(prompts),
                "prompt": np.repeat(np.arange(first, first + len(prompts), dtype=np.int32), LENGTH),
                "position": np.tile(np.arange(LENGTH, dtype=np.int32), len(prompts)),
                "cosine": values,
                "norm_ratio": values / 2,
            }
        )


class Together(Processes):
    """One of several processes that meet at once: the others have nothing to say."""

    def agree(self, step: Any) -> Any:
        return step()

    def share(self, step: Any) -> Any:
        return step()


def sample(name: str, first: int, prompts: int) -> CorpusSample:
    rows = [list(range(first + LENGTH * n, first + LENGTH * (n + 1))) for n in range(prompts)]
    return CorpusSample(
        Corpus(name, name), rows, held_out=[], documents=9, short_documents=0, sha256=None, opening=[],
        joined_by=None,
    )  # fmt: skip


SAMPLES = [sample("a", 0, 5), sample("b", 100, 4)]
BATCHES = [  # by two: the first prompt's number within its corpus, and the prompts
    (first, each.prompts[first : first + 2]) for each in SAMPLES for first in range(0, len(each.prompts), 2)
]


def run(
    batch_size: int = 2, processes: Processes | None = None, checkpoint: Checkpoint | None = None
) -> tuple[list[Trace], Recorded]:
    passes: Any = Recorded()
    found = gather(passes, SAMPLES, batch_size, processes=processes or Processes(), checkpoint=checkpoint)
    return found, passes


def assert_whole(traces: list[Trace]) -> None:
    """Every prompt once, in its corpus, in order, with its own values."""
    assert [(trace.corpus, trace.prompt_tokens) for trace in traces] == [("a", 2), ("b", 2)]
    for trace, each in zip(traces, SAMPLES, strict=True):
        count = len(each.prompts)
        tokens = np.array(each.prompts).ravel()
        assert trace.prompt.tolist() == np.repeat(range(count), LENGTH).tolist()
        assert trace.position.tolist() == list(range(LENGTH)) * count
        expected = (tokens[:, None] / 1000 + np.arange(LAYERS) / 10).astype(np.float32)
        np.testing.assert_allclose(trace.cosine, expected, rtol=1e-6)
        np.testing.assert_allclose(trace.norm_ratio, expected / 2, rtol=1e-6)
        assert (trace.tokens, trace.num_layers) == (count * LENGTH, LAYERS)
        assert first_rows(trace, count) == each.prompts


@pytest.mark.parametrize("batch_size", [1, 2, 5, 9])
def test_traces_hold_every_prompt_once_whatever_the_batch(batch_size: int) -> None:
    traces, passes = run(batch_size)
    assert_whole(traces)
    assert len(passes.ran) == -(-5 // batch_size) + -(-4 // batch_size)
    assert len(traces[0].parts) == -(-5 // batch_size)


def test_batches_are_the_same_whoever_runs_them(tmp_path: Path) -> None:
    _, alone = run()
    assert alone.ran == BATCHES
    for rank in (0, 1):
        own = Checkpoint.open(tmp_path / str(rank), {})
        _, passes = run(processes=Together(rank, 2), checkpoint=own)
        assert passes.ran == BATCHES[rank::2]
    traces, passes = run(checkpoint=own)
    assert_whole(traces)
    assert passes.ran == BATCHES[0::2], "what process 1 kept is taken over"


def test_a_run_goes_on_from_its_checkpoint_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(tmp_path, {})
    with caplog.at_level(logging.WARNING):
        traces, first = run(checkpoint=checkpoint)
    assert_whole(traces)
    assert caplog.text == ""
    for place in ((0, 1), (1, 0)):
        checkpoint.part(*place).path.unlink()
    with caplog.at_level(logging.WARNING):
        traces, second = run(checkpoint=checkpoint)
    assert_whole(traces)
    assert len(first.ran) == 5
    assert second.ran == [BATCHES[1], BATCHES[3]]
    assert "going on from 3 of 5 batches" in caplog.text
    assert str(checkpoint.folder) in caplog.text


@pytest.mark.parametrize(("size", "says"), [(4, False), (5, False), (6, True)])
def test_processes_without_a_batch_are_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, size: int, says: bool
) -> None:
    for rank in (0, 1):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            folder = Checkpoint.open(tmp_path / str(rank), {})
            run(processes=Together(rank, size), checkpoint=folder)
        told = "6 processes share 5 batches, so some have none" in caplog.text
        assert told is (says and rank == 0)


def test_few_batches_left_of_a_resumed_run_are_no_reason_to_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = Checkpoint.open(tmp_path, {})
    run(checkpoint=checkpoint)
    checkpoint.part(0, 0).path.unlink()
    with caplog.at_level(logging.WARNING):
        run(processes=Together(0, 2), checkpoint=checkpoint)
    assert "share" not in caplog.text


def test_the_first_rows_stop_at_the_part_that_has_enough() -> None:
    traces, _ = run()
    for count in range(6):
        assert first_rows(traces[0], count) == SAMPLES[0].prompts[:count]
    only = Trace("a", 2, [traces[0].parts[0], Held({})])  # a second part that cannot be read
    assert first_rows(only, 2) == SAMPLES[0].prompts[:2]


def test_one_process_shows_its_own_prompts_on_a_bar(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bars: list[tuple[str, int, bool]] = []
    steps: list[int] = []

    class Bar:
        def update(self, prompts: int) -> None:
            steps.append(prompts)

    @contextmanager
    def shown_bar(what: str, prompts: int, *, shown: bool) -> Iterator[Bar]:
        bars.append((what, prompts, shown))
        yield Bar()

    monkeypatch.setattr("skipcal.calibrate.gather.progress", shown_bar)
    for rank in (0, 1):
        run(processes=Together(rank, 2), checkpoint=Checkpoint.open(tmp_path / str(rank), {}))
    # Batches of 2, 2, 1 and 2, 2: every second one is the other's.
    assert bars == [("calibrate", 5, True), ("calibrate", 4, False)]
    assert steps == [2, 1, 2, 2, 2]
