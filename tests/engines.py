"""Two engines side by side."""

from __future__ import annotations

from typing import Any

import torch
from conftest import left_padded

from skipcal.runtime.policy import Policy, SkipPolicy
from skipcal.runtime.report import SkipReport
from skipcal.runtime.session import skipping

ROWS = [[5, 17, 31, 8, 44, 9], [7, 12], [60, 61, 62, 63]]
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=1)
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
