"""Two engines side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from conftest import left_padded

from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.runtime.session import skipping

ROWS = [[5, 17, 31, 8, 44, 9], [7, 12], [60, 61, 62, 63]]
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=1)
TOLERANCES = (1.0, 1.0, 1.5, 1.2)
ALWAYS = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=0)


def generated(
    model: Any, policy: Policy, engine: str, rows: list[list[int]] = ROWS, **options: Any
) -> tuple[Any, SkipReport]:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 12, "do_sample": False, **options}
    with skipping(model, policy=policy, engine=engine) as run:
        output = model.generate(**left_padded(rows), **settings)
    return output, run.report


def counts(report: SkipReport) -> tuple[Any, ...]:
    return (
        report.decode_steps,
        report.decode_steps_after_warm_up,
        report.skipped_per_layer,
        report.weight_bytes_saved,
    )


def assert_engines_agree(
    model: Any, policy: Policy, rows: list[list[int]] = ROWS, *, engine: str = "graph", **options: Any
) -> SkipReport:
    expected, eager = generated(model, policy, "eager", rows, **options)
    output, report = generated(model, policy, engine, rows, **options)
    assert torch.equal(output, expected)
    assert counts(report) == counts(eager)
    assert report.engine == engine, report.engine_reason
    return report


def policies(
    region: tuple[int, int],
    max_skips: int | None,
    warm_up: int,
    thresholds: Iterable[float],
    tolerances: tuple[float, ...] | None = None,
) -> Iterator[SkipPolicy]:
    """One policy for each threshold."""
    for threshold in thresholds:
        yield SkipPolicy(
            cold_s=region[0],
            cold_e=region[1],
            threshold=threshold,
            max_skips=max_skips,
            warm_up_tokens=warm_up,
            tolerances=tolerances,
        )


def assert_left_to_the_eager_engine(
    model: Any, engine: str, reason: str, caplog: pytest.LogCaptureFixture, **options: Any
) -> None:
    """The engine's report and one warning give `reason`; tokens and counts are the eager engine's."""
    expected, eager = generated(model, SOME, "eager", **options)
    with caplog.at_level(logging.WARNING):
        output, report = generated(model, SOME, engine, **options)
    sequences = [o.sequences if "return_dict_in_generate" in options else o for o in (output, expected)]
    assert torch.equal(*sequences)
    assert counts(report) == counts(eager)
    assert report.engine == "eager"
    assert reason in report.engine_reason
    assert [reason in record.message for record in caplog.records] == [True]
