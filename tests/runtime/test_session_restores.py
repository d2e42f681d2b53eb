"""`skipping` leaves nothing behind: on one model by every way out, and on every family."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from conftest import DENSE, left_padded, lively
from sessions import ALWAYS, FULL, ROWS, prompt, state_of
from transformers import (
    StoppingCriteria,
)

from skipcal.core.policy import SkipPolicy
from skipcal.runtime.session import skipping


def test_nothing_is_left_behind(tiny: Any) -> None:
    ids = prompt()["input_ids"]
    before, logits = state_of(tiny), tiny(ids).logits
    signature = inspect.signature(tiny.generate)
    with skipping(tiny, policy=ALWAYS):
        tiny.generate(**prompt(), max_new_tokens=5, do_sample=False)
        assert inspect.signature(tiny.generate) == signature
    assert state_of(tiny) == before
    assert torch.equal(tiny(ids).logits, logits)
    assert inspect.signature(tiny.generate) == signature


def test_nothing_is_left_behind_by_an_exception(tiny: Any) -> None:
    before = state_of(tiny)

    class Boom(StoppingCriteria):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"), skipping(tiny, policy=ALWAYS):
        tiny.generate(**prompt(), max_new_tokens=5, stopping_criteria=[Boom()])
    assert state_of(tiny) == before


def test_what_stood_on_the_instance_comes_back(tiny: Any) -> None:
    """accelerate and kernels set forward on instances too; the wrapper goes around and away."""
    layer = tiny.model.layers[2].mlp
    original = layer.forward
    calls = []

    def own(x: torch.Tensor) -> Any:
        calls.append(x.shape)
        return original(x)

    layer.forward = own
    with skipping(tiny, policy=ALWAYS):
        tiny.generate(**prompt(), max_new_tokens=5, do_sample=False)
    assert layer.__dict__["forward"] is own
    assert len(calls) == 2  # the proof and the prefill; every decode step skipped it


def test_another_model_of_the_class_is_untouched(tiny: Any) -> None:
    other = copy.deepcopy(tiny)
    expected = other.generate(**prompt(), max_new_tokens=9, do_sample=False)
    with skipping(tiny, policy=ALWAYS) as run:
        assert torch.equal(other.generate(**prompt(), max_new_tokens=9, do_sample=False), expected)
    assert run.report.decode_steps == 0


@pytest.mark.parametrize("model_type", DENSE)
def test_every_family_skips_restores_and_agrees_with_teacher_forcing(model_type: str) -> None:
    model: Any = lively(model_type)
    state = state_of(model)
    inputs = left_padded(ROWS, pad=0)
    full = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    with skipping(model, policy=FULL):
        assert torch.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False), full)

    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, max_skips=2, warm_up_tokens=2)
    row = left_padded(ROWS[:1])
    with skipping(model, policy=policy) as stepped:
        output = model.generate(
            **row, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    text = output.sequences[:, :-1]
    with skipping(model, policy=policy, teacher_forced=True, prompt_tokens=6) as forced:
        logits = model(text, use_cache=False).logits
    assert stepped.report.skipped_per_layer == (0, 5, 5, 0)
    assert forced.report.skipped_per_layer == (0, 5, 5, 0)
    torch.testing.assert_close(logits[:, 5:], torch.stack(output.logits, dim=1), atol=1e-4, rtol=1e-4)
    assert state_of(model) == state
