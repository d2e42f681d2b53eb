"""`skipcal generate`: what counts as set-up, as prefill and as decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from skipcal.arch.loading import LoadedModel
from skipcal.core.policy import SkipPolicy
from skipcal.runtime import session
from skipcal.runtime.engines.step_engine import StepEngine
from skipcal.runtime.generation import generate_text
from skipcal.runtime.session import skipping


class FakeClock:
    """Stands still, but for what is said to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self._patch = monkeypatch
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def slow(self, owner: Any, name: str, seconds: float) -> None:
        """Let each call of a function take so long."""
        original: Callable[..., Any] = getattr(owner, name)

        def slowed(*args: Any, **options: Any) -> Any:
            self.now += seconds
            return original(*args, **options)

        self._patch.setattr(owner, name, slowed)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("engine", ["recorded", "graph"])
def test_set_up_is_neither_prefill_nor_decoding(
    worded: LoadedModel, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    clock = FakeClock(monkeypatch)
    clock.slow(session, "locate", 30)
    clock.slow(StepEngine, "cache_for", 7)  # before the prompt's pass
    clock.slow(StepEngine, "_prove", 100)  # two of them
    clock.slow(StepEngine, "run_no_sync", 1)
    policy = SkipPolicy(cold_s=1, cold_e=7, threshold=0.9, warm_up_tokens=0)
    done = generate_text(
        worded, skipping(worded.model, policy=policy, engine=engine), "w5 w6 w7", new_tokens=6
    )
    assert (done.report.engine, done.report.prepared_passes) == (engine, 5)
    assert done.setup_s == 30 + 2 * 100
    assert done.prefill_s == 7
    assert done.decode_s == 5
    assert done.tok_per_s == 1
    assert done.to_dict()["setup_s"] == done.setup_s
