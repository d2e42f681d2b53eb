"""Turns, medians and the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipcal.speed import timing
from skipcal.speed.timing import StepClock, interleave, spread


def test_arms_take_turns_and_every_second_round_is_reversed() -> None:
    order: list[str] = []

    def arm(name: str) -> Callable[[], int]:
        def run() -> int:
            order.append(name)
            return len(order)

        return run

    results = interleave({name: arm(name) for name in "abc"}, rounds=2)
    assert "".join(order) == "cba" + "abc" + "cba"
    assert results == {"a": [4, 9], "b": [5, 8], "c": [6, 7]}  # the first three are not counted
    assert interleave({name: arm(name) for name in "abc"}, rounds=2, warm_ups=0) == {
        "a": [10, 15],
        "b": [11, 14],
        "c": [12, 13],
    }


def test_a_time_limit_leaves_out_rounds_but_never_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("skipcal.speed.timing.time.perf_counter", lambda: now[0])

    def ten_seconds() -> None:
        now[0] += 10.0

    assert len(interleave({"a": ten_seconds}, 9, time_limit_s=45)["a"]) == 3  # and one not counted
    assert len(interleave({"a": ten_seconds}, 9, time_limit_s=0)["a"]) == 1
    assert len(interleave({"a": ten_seconds}, 2)["a"]) == 2


def test_the_median_is_over_all_steps_and_the_range_over_rounds() -> None:
    found = spread([[1.0, 2.0, 9.0], [3.0, 4.0, 5.0]])
    assert (found.median, found.min, found.max, found.rounds) == (3.5, 2.0, 4.0, 2)


def test_the_clock_tells_the_prefill_from_the_steps(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 5.0, 6.0, 8.0])
    monkeypatch.setattr("skipcal.speed.timing.time.perf_counter", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    scores = torch.rand(1, 5)
    assert all(clock(torch.tensor([[1]]), scores) is scores for _ in range(3))
    assert clock.timing() == timing.Timing(prefill_s=5.0, step_s=(1.0, 2.0))
