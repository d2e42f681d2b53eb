"""The recorded engine against the eager one, token for token, count for count and bit for bit."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DENSE, left_padded, lively
from engines import (
    ALWAYS,
    ROWS,
    SOME,
    TOLERANCES,
    assert_engines_agree,
    assert_left_to_the_eager_engine,
    counts,
    generated,
    policies,
)
from gated import random_map
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipcal.arch.check import tiny_model
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import SkipPolicy
from skipcal.core.surrogates import Surrogates
from skipcal.runtime.engines import recorded, recorded_step
from skipcal.runtime.session import skipping

NOT_RECORDED = {
    ("gemma2", 1): "attention 'eager' is not torch's own",  # which caps its scores
    ("gemma2", 3): "attention 'eager' is not torch's own",
    ("opt", 3): "rows may be left out",  # it flattens between norm and FFN
}
LOGITS = {"output_logits": True, "return_dict_in_generate": True}


def agree(model: Any, policy: Any, rows: list[list[int]] = ROWS, **options: Any) -> Any:
    return assert_engines_agree(model, policy, rows, engine="recorded", **options)


# The same tokens, counts and logits


@pytest.mark.parametrize("region", [(0, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize("max_skips", [None, 0, 2])
@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_eager_engine(
    tiny: Any, region: tuple[int, int], max_skips: int | None, warm_up: int, rows: int
) -> None:
    for policy in policies(region, max_skips, warm_up, (-1.0, 0.6, 2.0)):
        agree(tiny, policy, ROWS[:rows], max_new_tokens=8)


@pytest.mark.parametrize("max_skips", [None, 1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_with_tolerances_equals_the_eager_engine(tiny: Any, max_skips: int | None, rows: int) -> None:
    for policy in policies((0, 4), max_skips, 1, (-1.0, 0.6, 2.0), TOLERANCES):
        agree(tiny, policy, ROWS[:rows], max_new_tokens=8)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("model_type", DENSE)
def test_every_family_decodes_as_it_does_eagerly(model_type: str, rows: int) -> None:
    model, policy = lively(model_type), SkipPolicy(cold_s=0, cold_e=4, threshold=0.65, warm_up_tokens=1)
    if reason := NOT_RECORDED.get((model_type, rows)):
        expected, _ = generated(model, policy, "eager", ROWS[:rows])
        output, report = generated(model, policy, "recorded", ROWS[:rows])
        assert torch.equal(output, expected)
        assert reason in report.engine_reason
    else:
        report = agree(model, policy, ROWS[:rows])
    assert report.skipped_blocks > 0


@pytest.mark.parametrize("layers", [(0, 4), (1, 2)])
def test_mixtures_of_experts_stay_as_they_are(layers: tuple[int, int]) -> None:
    """Also in layers where the rule has no say: which experts run depends on values."""
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    model.generation_config.eos_token_id = None
    policy = SkipPolicy(cold_s=layers[0], cold_e=layers[1], threshold=0.65, warm_up_tokens=1)
    agree(model, policy)
    agree(model, policy, ROWS[:1])


@pytest.mark.parametrize("rows", [ROWS[:1], [ROWS[0], ROWS[0][::-1]], ROWS])
def test_logits_are_the_same_bit_for_bit(tiny: Any, rows: list[list[int]]) -> None:
    """One row, two of one length, and three with padding."""
    expected, _ = generated(tiny, SOME, "eager", rows, **LOGITS)
    found, report = generated(tiny, SOME, "recorded", rows, **LOGITS)
    assert report.engine == "recorded" and report.skipped_blocks > 0
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gate_decides_and_surrogates_stand_in(tiny: Any, rows: int, maps: int) -> None:
    hidden, generator = tiny.config.hidden_size, torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates = Gates((1, 2), values(2, hidden), values(2), values(2))
    stand_ins = Surrogates({layer: random_map(hidden, 3, maps, generator) for layer in (1, 2)})
    policy = GatePolicy(
        gates=gates, surrogates=stand_ins, threshold=float(gates.bias.mean()), warm_up_tokens=2
    )
    report = agree(tiny, policy, ROWS[:rows])
    assert 0 < report.skipped_blocks < 2 * report.decode_steps_after_warm_up


def test_ffns_chosen_at_random_are_the_same_ones(tiny: Any) -> None:
    policy = ChosenFFNs(method="random", layers=(0, 2, 3), probability=0.5, warm_up_tokens=1, seed=4)
    assert agree(tiny, policy).skipped_blocks > 0


def test_samples_are_the_same_ones(tiny: Any) -> None:
    agree(tiny, SOME, do_sample=True, top_k=8, temperature=1.3)


def test_rows_that_are_over_do_not_count(tiny: Any) -> None:
    free, _ = generated(tiny, SOME, "eager")
    assert agree(tiny, SOME, eos_token_id=int(free[0, -8])).decode_steps < 33


def test_the_cache_grows_with_the_text(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded_step, "FIRST_SLOTS", 4)
    agree(tiny, SOME, max_new_tokens=40)


def test_calls_one_after_the_other_use_one_recording(tiny: Any) -> None:
    with skipping(tiny, policy=SOME, engine="recorded") as run:
        outputs = [tiny.generate(**left_padded(ROWS), max_new_tokens=9, do_sample=False) for _ in range(2)]
        engine: Any = run._engine
        recording = engine._step._recording
        tiny.generate(**left_padded(ROWS[::-1]), max_new_tokens=30, do_sample=False)
        assert engine._step._recording is recording
        tiny.generate(**left_padded(ROWS[:2]), max_new_tokens=5, do_sample=False)
        assert engine._step._recording is not recording
    assert torch.equal(*outputs)


@pytest.mark.usefixtures("references")
@pytest.mark.parametrize("engine", ["recorded", "graph"])
def test_a_cache_that_is_handed_out_is_an_ordinary_one(tiny: Any, engine: str) -> None:
    expected, _ = generated(tiny, SOME, "eager", ROWS[:1], **LOGITS)
    output, _ = generated(tiny, SOME, engine, ROWS[:1], **LOGITS)
    for mine, its in zip(output.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert mine.keys.shape == its.keys.shape == (1, 2, 17, 8)  # without room for more
        torch.testing.assert_close(mine.keys, its.keys)
        torch.testing.assert_close(mine.values, its.values)
    for cache in (output.past_key_values, expected.past_key_values):
        cache.crop(-3)
        assert cache.get_seq_length() == 14
    row = torch.tensor([[7]])
    again, whole = (
        tiny(row, past_key_values=o.past_key_values, use_cache=True).logits for o in (output, expected)
    )
    torch.testing.assert_close(again, whole)


# When it is taken


def test_auto_takes_it_once_a_session_is_long(tiny: Any) -> None:
    with skipping(tiny, policy=SOME) as run:
        first = tiny.generate(**left_padded(ROWS[:1]), max_new_tokens=recorded.FIRST_EAGER, do_sample=False)
        assert run.report.engine == "eager" and "takes over after 100" in run.report.engine_reason
        more = tiny.generate(**left_padded(ROWS[:1]), max_new_tokens=20, do_sample=False)
    assert run.report.engine == "recorded"
    assert "on a cpu, after 100 eager decode steps; a step is" in run.report.engine_reason
    with skipping(tiny, policy=SOME, engine="eager") as eager:
        options = {**left_padded(ROWS[:1]), "do_sample": False}
        assert torch.equal(tiny.generate(**options, max_new_tokens=recorded.FIRST_EAGER), first)
        assert torch.equal(tiny.generate(**options, max_new_tokens=20), more)
    assert counts(run.report) == counts(eager.report)


def hooked(model: Any) -> None:
    model.lm_head.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    original = model.model.layers[2].mlp.forward
    model.model.layers[2].mlp.forward = lambda x: original(x)


def attention_of_its_own(model: Any) -> None:
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (hooked, {}, "forward hooks are set"),
        (replaced, {}, "another forward"),
        (attention_of_its_own, {}, "attention 'eager' is not torch's own"),
        (None, {"num_beams": 2}, "beam search reorders the cache"),
        (None, {"cache_implementation": "static"}, "cache_implementation='static'"),
    ],
)
def test_the_rest_is_left_to_the_eager_engine(
    tiny: Any,
    change: Callable[[Any], None] | None,
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if change is not None:
        change(tiny)
    assert_left_to_the_eager_engine(tiny, "recorded", reason, caplog, **options)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        generated(tiny, SOME, "auto", **options)
    assert not caplog.records  # nobody asked for it, and on a CPU little is lost


def test_a_narrow_window_and_autocast_are_left_to_the_eager_engine(tiny: Any) -> None:
    _, report = generated(lively("mistral", sliding_window=8), SOME, "recorded")
    assert "attention window of 8" in report.engine_reason
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, report = generated(tiny, SOME, "recorded")
    assert "autocast is on" in report.engine_reason


def test_a_hook_set_between_two_calls_is_called(tiny: Any) -> None:
    calls = []
    with skipping(tiny, policy=ALWAYS, engine="recorded") as run:
        tiny.generate(**left_padded(ROWS), max_new_tokens=6, do_sample=False)
        tiny.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
        tiny.generate(**left_padded(ROWS), max_new_tokens=6, do_sample=False)
    assert len(calls) == 6  # the prefill and five steps
    assert "eager in part: forward hooks are set" in run.report.engine_reason


# Refused rather than wrong


def with_logits(model: Any, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Make the logits depend on a number that Python takes from the cache, or on themselves."""

    class Changed(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length()
            output = super().forward(*args, **kwargs)
            output.logits = change(output.logits, past)
            return output

    Changed.__name__ = type(model).__name__
    Changed.forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    model.__class__ = Changed


def test_a_length_taken_for_a_constant_is_found_out(tiny: Any) -> None:
    with_logits(tiny, lambda x, past: x.roll(past, -1))
    expected, eager = generated(tiny, SOME, "eager")
    output, report = generated(tiny, SOME, "recorded")
    assert "the result of a step is off by" in report.engine_reason
    assert torch.equal(output, expected) and counts(report) == counts(eager)


def test_a_model_that_reads_values_is_not_recorded(tiny: Any) -> None:
    with_logits(tiny, lambda x, _: x * 2 if float(x.sum()) > 0 else x)
    expected, _ = generated(tiny, SOME, "eager")
    output, report = generated(tiny, SOME, "recorded")
    assert "could not be captured" in report.engine_reason and "reads the values" in report.engine_reason
    assert torch.equal(output, expected)


def test_rows_are_not_left_out_where_a_layer_reaches_into_its_ffn(tiny: Any) -> None:
    """What a layer does between norm and FFN is recorded with all rows: for one row only."""
    layer = type(tiny.model.layers[0])

    class Reaching(layer):  # type: ignore[valid-type, misc]
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            h = hidden_states + attended
            return h + self.mlp(self.post_attention_layernorm(h) * 1.0)

    tiny.model.layers[2].__class__ = Reaching
    expected, eager = generated(tiny, SOME, "eager")
    output, report = generated(tiny, SOME, "recorded")
    assert "rows may be left out" in report.engine_reason
    assert torch.equal(output, expected) and counts(report) == counts(eager)
    agree(tiny, SOME, ROWS[:1])


def test_nothing_is_left_behind(tiny: Any) -> None:
    names, attention = set(ALL_ATTENTION_FUNCTIONS), tiny.config._attn_implementation
    before, whole = [set(module.__dict__) for module in tiny.modules()], type(tiny)
    with_logits(tiny, lambda x, _: x * 2 if float(x.sum()) > 0 else x)
    generated(tiny, SOME, "recorded")  # given up in the middle of a recording
    tiny.__class__ = whole
    agree(tiny, SOME)
    assert set(ALL_ATTENTION_FUNCTIONS) == names
    assert tiny.config._attn_implementation == attention
    assert [set(module.__dict__) for module in tiny.modules()] == before
    x = torch.ones(2)
    assert (x + 1).tolist() == [2.0, 2.0]
