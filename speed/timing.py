"""Interleaved timing: arms take turns, steps are timed one by one, medians come with their range."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import LogitsProcessor

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class Spread:
    """A median over everything measured, and the smallest and largest value of a round."""

    median: float
    min: float
    max: float
    rounds: int

    def to_dict(self) -> dict[str, float]:
        """Plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Timing:
    """One run of an arm: seconds until the first token, and of each decode step after it."""

    prefill_s: float
    step_s: tuple[float, ...]


class StepClock(LogitsProcessor):
    """Takes the time whenever `generate()` has the logits of a token; it changes nothing in them.

    On a GPU an event is put on the stream, which waits for nothing; the times are read at the end.
    """

    def __init__(self, device: torch.device) -> None:
        """Start now: the call of generate() follows."""
        self._device = device
        self._ticks: list[Any] = []
        self._tick()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Take the time."""
        self._tick()
        return scores

    def timing(self) -> Timing:
        """Seconds between the ticks: the first is the prefill, the others are decode steps."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            seconds = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self._ticks)]
        else:
            seconds = [b - a for a, b in itertools.pairwise(self._ticks)]
        return Timing(seconds[0], tuple(seconds[1:]))

    def _tick(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._ticks.append(event)
        else:
            self._ticks.append(time.perf_counter())


def interleave(
    arms: Mapping[str, Callable[[], Measured]],
    rounds: int,
    *,
    warm_ups: int = 1,
    time_limit_s: float | None = None,
) -> dict[str, list[Measured]]:
    """What each arm returned, by round. The arms take turns, so a drifting machine hits all alike.

    Every second round runs in reverse order.
    warm_ups:     rounds before them that are not counted; 0 for arms that are processes of their own.
    time_limit_s: no round begins that is not expected to end within it, save the first counted one.
    """
    results: dict[str, list[Measured]] = {name: [] for name in arms}
    start = time.perf_counter()
    for index in range(rounds + warm_ups):
        passed = time.perf_counter() - start
        if time_limit_s is not None and index > warm_ups and passed * (index + 1) / index > time_limit_s:
            break
        order = list(arms)[:: 1 if (index - warm_ups) % 2 == 0 else -1]
        measured = {name: arms[name]() for name in order}
        if index >= warm_ups:
            for name, value in measured.items():
                results[name].append(value)
    return results


def spread(rounds: Sequence[Sequence[float]]) -> Spread:
    """Median over the values of all rounds; range over the medians of each.

    Every step of an arm does the same work, so a median is its time: machines stall now and then,
    and a mean or a total would measure the stalls.
    """
    each = [statistics.median(values) for values in rounds]
    return Spread(statistics.median(itertools.chain.from_iterable(rounds)), min(each), max(each), len(each))
