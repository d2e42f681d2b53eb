"""One small measurement, shared by all tests that look at results."""

from __future__ import annotations

from typing import Any

import pytest

from skipcal.configs.bench import BenchConfig
from skipcal.speed import hardware
from skipcal.speed.bench import load_subject, run_bench

RATIOS = [0.1, 0.25, 0.5]


@pytest.fixture(autouse=True)
def _small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)


@pytest.fixture(scope="session")
def result() -> dict[str, Any]:
    config = BenchConfig(
        shape="tiny", device="cpu", ratios=RATIOS, batch_size=[1, 2], context_tokens=[8], new_tokens=5,
        rounds=2, peers=True,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
        return run_bench(config, load_subject(config))
