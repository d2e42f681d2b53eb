"""What the graph engine leaves to the eager one, wholly or FFN by FFN; and nothing on the model."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import left_padded, lively
from engines import (
    ALWAYS,
    ROWS,
    SOME,
    assert_engines_agree,
    assert_left_to_the_eager_engine,
    counts,
    generated,
)
from transformers import DynamicCache, StoppingCriteria

from skipcal.arch.locate import locate
from skipcal.runtime.engines import graph_step
from skipcal.runtime.session import skipping

pytestmark = pytest.mark.usefixtures("references", "small_caches")

# What it cannot run


def windowed(model: Any) -> Any:
    return lively("mistral", sliding_window=8)


def wrapped(model: Any) -> Any:
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    return model


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (None, {"num_beams": 2}, "beam search reorders the cache"),
        (None, {"cache_implementation": "static"}, "cache_implementation='static'"),
        (None, {"output_hidden_states": True, "return_dict_in_generate": True}, "hidden states"),
        (windowed, {}, "attention window of 8"),
        (wrapped, {}, "another forward"),
    ],
)
def test_the_rest_is_left_to_the_eager_engine_with_one_warning(
    tiny: Any,
    change: Callable[[Any], Any] | None,
    options: dict[str, Any],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = change(tiny) if change is not None else tiny
    assert_left_to_the_eager_engine(model, "graph", reason, caplog, **options)


def test_a_cache_of_the_callers_is_decoded_eagerly(tiny: Any) -> None:
    cache = DynamicCache(config=tiny.config)
    _, report = generated(tiny, SOME, "graph", past_key_values=cache)
    assert "generate() was given a cache" in report.engine_reason
    assert report.skipped_blocks > 0


def test_a_model_that_no_step_can_run_is_decoded_eagerly(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = locate(tiny)
    tiny.config._attn_implementation = "flex_attention"
    session = skipping(tiny, policy=SOME, engine="graph", architecture=found)
    with caplog.at_level(logging.WARNING), session as run:
        pass
    assert run.report.engine == "eager"
    assert "'flex_attention' takes no mask" in run.report.engine_reason
    assert "engine graph is not used" in caplog.text


@pytest.mark.parametrize("engine", ["graph", "recorded"])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rotary_embedding_that_changes_with_the_length_is_not_prepared(kind: str, engine: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 64}
    model = lively("llama", rope_parameters=rope)
    _, report = generated(model, SOME, engine)
    assert report.engine == "eager"
    assert f"its rotary embedding ({kind}) looks at how long the text has become" in report.engine_reason


def test_a_step_that_fails_or_lies_is_given_up(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.set_attn_implementation("eager")  # which is given the mask of `_mask`
    expected, eager = generated(tiny, SOME, "eager")

    def out_of_memory(self: Any, mask: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def wrong(self: Any, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape)[:, None, None]  # padding in sight, and what is yet to come

    for name, broken, reason in (
        ("settle", out_of_memory, "could not be captured (CUDA out of memory)"),
        ("_mask", wrong, "layer 0 of a step is off by"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(graph_step.DecodeStep, name, broken)
            output, report = generated(tiny, SOME, "graph")
        assert torch.equal(output, expected)
        assert counts(report) == counts(eager)
        assert report.engine == "eager"
        assert reason in report.engine_reason


def test_a_teacher_forced_pass_is_the_eager_engines(tiny: Any) -> None:
    ids = torch.tensor([ROWS[0]])
    with skipping(tiny, policy=ALWAYS, engine="graph", teacher_forced=True) as run:
        tiny(ids)
    assert run.report.skipped_blocks == 2 * 5
    assert run.report.engine == "eager"


def test_a_hand_written_loop_is_the_eager_engines(tiny: Any) -> None:
    with skipping(tiny, policy=ALWAYS, engine="graph") as run:
        out = tiny(torch.tensor([ROWS[0]]), use_cache=True)
        tiny(torch.tensor([[4]]), past_key_values=out.past_key_values, use_cache=True)
    assert run.report.skipped_per_layer == (0, 0, 1, 1)
    assert run.report.engine == "eager"


# How each FFN runs


def with_bias(model: Any) -> str:
    linear = model.model.layers[2].mlp.up_proj
    linear.bias = torch.nn.Parameter(torch.ones(linear.out_features))
    return "have biases"


def with_adapter(model: Any) -> str:
    class Adapted(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean(-1, keepdim=True)

    mlp = model.model.layers[2].mlp
    old, mlp.gate_proj = mlp.gate_proj, Adapted(32, 48, bias=False)
    mlp.gate_proj.weight = old.weight
    return "is not three plain linears"


def with_hook(model: Any) -> str:
    model.model.layers[2].mlp.gate_proj.register_forward_hook(lambda module, args, output: output * 0.5)
    return "has hooks inside"


def with_other_activation(model: Any) -> str:
    model.model.layers[2].mlp.act_fn = torch.nn.Tanh()
    return "computes something else"


@pytest.mark.parametrize("change", [with_bias, with_adapter, with_hook, with_other_activation])
def test_an_ffn_that_the_kernels_do_not_compute_runs_as_it_is(
    tiny: Any, change: Callable[[Any], str]
) -> None:
    reason = change(tiny)
    report = assert_engines_agree(tiny, SOME)
    assert "3 layers fused, 1 as modules in IF nodes" in report.engine_reason
    assert reason in report.engine_reason


def test_a_layer_that_drops_something_is_not_run_whole(tiny: Any) -> None:
    """Its dropout is never called here, and stands for one that is."""
    tiny.model.layers[2].resid_attn_dropout = torch.nn.Dropout(0.5).train()
    report = assert_engines_agree(tiny, SOME)
    assert "3 layers fused, 1 FFNs in predicated kernels" in report.engine_reason
    assert "is not attention and FFN" in report.engine_reason


def test_a_module_in_an_if_node_does_not_run_when_all_rows_skip(tiny: Any) -> None:
    with_bias(tiny)
    calls = []
    inner = tiny.model.layers[2].mlp.up_proj
    forward = inner.forward

    def counted(x: torch.Tensor) -> Any:
        calls.append(1)
        return forward(x)

    inner.forward = counted
    with skipping(tiny, policy=ALWAYS, engine="graph"):
        tiny.generate(**left_padded(ROWS), max_new_tokens=6, do_sample=False)
    # proof of the architecture, prefill, two passes for each of two proofs; and no decode step
    assert len(calls) == 6


# Leaving nothing behind


def state_of(model: Any) -> list[Any]:
    return [
        (name, sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks))
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(tiny: Any, fails: bool) -> None:
    ids = torch.tensor([ROWS[0]])
    before, logits = state_of(tiny), tiny(ids).logits

    class Boom(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if fails and input_ids.shape[1] > 9:
                raise RuntimeError("boom")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    try:
        with skipping(tiny, policy=ALWAYS, engine="graph") as run:
            tiny.generate(**left_padded(ROWS[:1]), max_new_tokens=8, stopping_criteria=[Boom()])
    except RuntimeError as error:
        assert fails and str(error) == "boom"
    assert run.report.engine == "graph"
    assert state_of(tiny) == before
    assert torch.equal(tiny(ids).logits, logits)


def test_another_model_of_the_class_is_untouched(tiny: Any) -> None:
    other = copy.deepcopy(tiny)
    expected = other.generate(**left_padded(ROWS), max_new_tokens=9, do_sample=False)
    with skipping(tiny, policy=ALWAYS, engine="graph"):
        again = other.generate(**left_padded(ROWS), max_new_tokens=9, do_sample=False)
    assert torch.equal(again, expected)
