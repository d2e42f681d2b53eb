"""The proof of a prepared step: faults stand out of the noise of any dtype, and noise is no fault.

200 models a dtype stand in tests/step_proof.json (tests/prove_steps.py); here are a few of them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from conftest import attentive, lively
from engines import ROWS, counts, generated
from faults import IN_A_GRAPH, RECORDED

from skipcal.core.policy import SkipPolicy
from skipcal.runtime.engines import step_engine
from skipcal.runtime.engines.step_proof import Deviation, added_error, logits_deviation

pytestmark = pytest.mark.usefixtures("references", "small_caches")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SOME = SkipPolicy(cold_s=1, cold_e=4, threshold=0.55, warm_up_tokens=1)


@cache
def deep(dtype: torch.dtype, layers: int, *, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return attentive(lively("llama", num_hidden_layers=layers)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [16, 48])
@pytest.mark.parametrize("engine", ["graph", "recorded"])
def test_rounding_is_no_fault_however_deep_the_model(dtype: torch.dtype, layers: int, engine: str) -> None:
    for rows in (1, 3):
        _, report = generated(deep(dtype, layers, seed=rows), SOME, engine, ROWS[:rows], max_new_tokens=5)
        assert report.engine == engine, report.engine_reason
        assert (report.prepared_passes, report.eager_passes) == (4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", IN_A_GRAPH)
def test_a_fault_of_a_captured_step_is_found(
    dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, plant = IN_A_GRAPH[fault]
    assert_found(deep(dtype, 24), "graph", rows, plant, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", RECORDED)
def test_a_fault_of_a_recorded_step_is_found(
    dtype: torch.dtype, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, plant = RECORDED[fault]
    assert_found(deep(dtype, 24), "recorded", rows, plant, monkeypatch)


@cache
def eagerly(model: Any, rows: int) -> Any:
    return generated(model, SOME, "eager", ROWS[:rows], max_new_tokens=5)


def assert_found(model: Any, engine: str, rows: int, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, eager = eagerly(model, rows)
    plant(monkeypatch)
    output, report = generated(model, SOME, engine, ROWS[:rows], max_new_tokens=5)
    assert report.engine == "eager", report.engine_reason
    assert "is off by" in report.engine_reason
    assert (report.prepared_passes, report.eager_passes) == (0, 4)
    assert torch.equal(output, expected) and counts(report) == counts(eager)


def test_a_step_that_is_wrong_at_the_second_place_is_given_up_and_said_to_be(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = generated(tiny, SOME, "eager")
    before = step_engine.StepEngine._prove

    def from_the_second_on(self: Any, step: Any, given: Any) -> bool:
        if step.proofs == 1:
            monkeypatch.setattr(step, "deviations", lambda _: [Deviation("layer 2", 1.0, 0.1)])
        return before(self, step, given)

    monkeypatch.setattr(step_engine.StepEngine, "_prove", from_the_second_on)
    output, report = generated(tiny, SOME, "graph")
    assert torch.equal(output, expected)
    assert report.engine == "eager"
    assert (report.prepared_passes, report.eager_passes) == (1, 10)
    assert "given up after 1 steps; one step, where layer 2 is off" in report.engine_reason


def test_one_miss_is_decoded_eagerly_and_tried_again(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A router may turn over by a rounding."""
    expected, _ = generated(tiny, SOME, "eager")
    before, found = step_engine.StepEngine._prove, [Deviation("layer 2", 0.3, 0.1)]

    def once(self: Any, step: Any, given: Any) -> bool:
        with monkeypatch.context() as patch:
            if found:
                first = found.pop()
                patch.setattr(step, "deviations", lambda _: [first])
            return before(self, step, given)

    monkeypatch.setattr(step_engine.StepEngine, "_prove", once)
    output, report = generated(tiny, SOME, "graph")
    assert torch.equal(output, expected)
    assert (report.engine, report.prepared_passes, report.eager_passes) == ("graph", 10, 1)
    assert "eager in part: one step, where layer 2 is off by 3.0e-01" in report.engine_reason


# What is compared


def test_what_a_layer_adds_is_compared_by_norms_of_the_worst_row() -> None:
    entered = torch.zeros(2, 3)
    own = torch.tensor([[3.0, 0.0, 4.0], [1.0, 0.0, 0.0]])
    mine = own + torch.tensor([[0.0, 0.5, 0.0], [0.0, 0.2, 0.0]])
    assert float(added_error(mine, own, entered)) == pytest.approx(0.2, rel=1e-5)


def test_two_roundings_of_a_long_stream_are_not_its_layers_fault() -> None:
    """At 1000 a bfloat16 lies 4 from the next: more than all that the layer adds."""
    entered = torch.tensor([[1000.0, 1.0]], dtype=torch.bfloat16)
    own = torch.tensor([[1000.0, 2.0]], dtype=torch.bfloat16)
    assert float(added_error(own + torch.tensor([4.0, 0.0], dtype=own.dtype), own, entered)) == 0.0
    assert float(added_error(own + torch.tensor([0.0, 1.0], dtype=own.dtype), own, entered)) > 0.9


def test_logits_are_compared_about_their_mean() -> None:
    own = torch.tensor([[100.0, 101.0, 102.0]])
    assert logits_deviation("it", own + 7.0, own, 0.1).error == 0.0
    assert logits_deviation("it", own * -1.0, own, 0.1).error == pytest.approx(2.0)


def test_what_is_no_number_is_no_noise() -> None:
    nan = torch.full((1, 3), torch.nan)
    assert not logits_deviation("it", nan, torch.ones(1, 3), 0.1).is_noise
