"""Counts by request: of those that run, and of the last that have ended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from skipcal.serving.clock import BatchTokens
from skipcal.serving.counts import KEPT
from skipcal.serving.tally import Tally, belongs


def step(tally: Tally, names: Sequence[str], *, ended: Sequence[str] = ()) -> None:
    """A pass with a decode step of each request, to which no rule applies."""
    places, nothing = np.arange(len(names)), np.zeros(len(names), dtype=bool)
    tokens = BatchTokens(places, ~nothing, places, (None,) * len(names), tuple(names), tuple(ended))
    tally.add(tokens, nothing, {}, ["static"] * len(names))


def test_the_last_that_ended_are_kept_and_all_that_run() -> None:
    tally = Tally("static", 2)
    step(tally, ["long"])
    for n in range(KEPT + 5):
        step(tally, [f"r{n}"], ended=[f"r{n - 1}"] if n else [])
    step(tally, ["long"], ended=[f"r{KEPT + 4}"])
    kept = {report.request_id: report.decode_steps for report in tally.requests()}
    assert kept == {**{f"r{n}": 1 for n in range(5, KEPT + 5)}, "long": 2}
    assert tally.requests("r4") == []
    assert [report.decode_steps for report in tally.requests("long")] == [2]
    assert tally.report.decode_steps == KEPT + 7


@pytest.mark.parametrize(
    ("name", "request_id"),
    [
        ("0-98ab12cd", "0"),
        ("1_0-98ab12cd", "0"),
        ("chatcmpl-7f-98ab12cd", "chatcmpl-7f"),
        ("2_chatcmpl-7f-98ab12cd", "chatcmpl-7f"),
        ("chatcmpl-a.b-98ab12cd", "chatcmpl-a.b"),
        ("cmpl-7f-0-98ab12cd", "cmpl-7f"),
        ("1_cmpl-7f-12-98ab12cd", "cmpl-7f"),
        ("cmpl-7f-1-98ab12cd", "cmpl-7f-1"),
        ("resp_7f_0-98ab12cd", "resp_7f"),
        ("chatcmpl-7f", "chatcmpl-7f"),
    ],
)
def test_an_answer_is_found_by_the_id_that_its_client_knows(name: str, request_id: str) -> None:
    assert belongs(name, request_id)


@pytest.mark.parametrize(
    ("name", "request_id"),
    [
        ("10-98ab12cd", "0"),
        ("chatcmpl-turn-1-2-98ab12cd", "chatcmpl-turn-1"),
        ("chatcmpl-turn-1-98ab12cd", "chatcmpl-turn"),
        ("cmpl-turn-1-0-98ab12cd", "cmpl-turn"),
        ("chatcmpl-aXb-98ab12cd", "chatcmpl-a.b"),
        ("chatcmpl-7f-98ab12cd", "cmpl-7f"),
        ("chatcmpl-7f-98ab12cd", ""),
    ],
)
def test_an_answer_is_not_taken_for_another_requests(name: str, request_id: str) -> None:
    assert not belongs(name, request_id)
