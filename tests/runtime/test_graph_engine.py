"""The graph engine against the eager one, token for token and count for count, uncaptured on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DENSE, attentive, left_padded, lively
from engines import ALWAYS, ROWS, SOME, TOLERANCES, assert_engines_agree, counts, generated, policies
from gated import random_map
from interpreted import small_blocks
from sessions import Heard
from transformers import LogitsProcessor, StoppingCriteria

from skipcal.arch.check import tiny_model
from skipcal.arch.locate import locate
from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy, Gates
from skipcal.core.policy import SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import LowRank, Surrogates
from skipcal.errors import ConfigError
from skipcal.ops import decode_attention as attention
from skipcal.ops.decode_attention import decode_attention
from skipcal.ops.ffn import FFNWeights
from skipcal.runtime.engines import graph_attention, graph_ffn, graph_layer, graph_step, recorded_step
from skipcal.runtime.engines.graph import GraphEngine
from skipcal.runtime.session import skipping

pytestmark = pytest.mark.usefixtures("references", "small_caches")


# The same tokens and counts


@pytest.mark.parametrize("region", [(0, 4), (1, 3), (1, 1)])
@pytest.mark.parametrize("max_skips", [None, 0, 1, 2])
@pytest.mark.parametrize("warm_up", [0, 3])
@pytest.mark.parametrize("rows", [1, 3])
def test_equals_the_eager_engine(
    tiny: Any, region: tuple[int, int], max_skips: int | None, warm_up: int, rows: int
) -> None:
    for policy in policies(region, max_skips, warm_up, (-1.0, 0.6, 2.0)):
        assert_engines_agree(tiny, policy, ROWS[:rows], max_new_tokens=8)


def test_rows_that_are_over_do_not_count(tiny: Any) -> None:
    free, _ = generated(tiny, SOME, "eager")
    report = assert_engines_agree(tiny, SOME, eos_token_id=int(free[0, -8]))
    assert report.decode_steps < 33


def test_a_spent_row_does_not_arm_again() -> None:
    model = lively("llama", num_hidden_layers=10)
    policy = SkipPolicy(cold_s=1, cold_e=9, threshold=-1.0, max_skips=2, warm_up_tokens=0)
    report = assert_engines_agree(model, policy)
    assert report.skipped_per_layer == (0, 0, 33, 33, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("max_skips", [None, 1, 2])
@pytest.mark.parametrize("rows", [1, 3])
def test_with_tolerances_equals_the_eager_engine(tiny: Any, max_skips: int | None, rows: int) -> None:
    for policy in policies((0, 4), max_skips, 1, (-1.0, 0.6, 2.0), TOLERANCES):
        assert_engines_agree(tiny, policy, ROWS[:rows], max_new_tokens=8)


@pytest.mark.parametrize("model_type", [*DENSE, "mixtral", "gpt_oss"])
def test_every_family_decodes_as_it_does_eagerly(model_type: str) -> None:
    if model_type in DENSE:
        model: Any = lively(model_type)
    else:
        model = tiny_model(model_type, num_local_experts=4, num_experts_per_tok=2)
        model.generation_config.eos_token_id = None
    report = assert_engines_agree(model, SkipPolicy(cold_s=0, cold_e=4, threshold=0.65, warm_up_tokens=1))
    assert report.skipped_blocks > 0


@pytest.mark.parametrize("maps", [1, 4])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_gate_decides_and_surrogates_stand_in_as_they_do_eagerly(tiny: Any, rows: int, maps: int) -> None:
    layers, hidden = (1, 2), tiny.config.hidden_size
    generator = torch.Generator().manual_seed(5)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates = Gates(layers, values(2, hidden), values(2), values(2))
    stand_ins = Surrogates({layer: random_map(hidden, 3, maps, generator) for layer in layers})
    threshold = float(gates.bias.mean())
    policy = GatePolicy(gates=gates, surrogates=stand_ins, threshold=threshold, warm_up_tokens=2)
    report = assert_engines_agree(tiny, policy, ROWS[:rows])
    assert 0 < report.skipped_blocks < 2 * report.decode_steps_after_warm_up


def test_rules_that_choose_ffns_are_captured_as_they_are(tiny: Any) -> None:
    for probability in (0.5, 1.0):
        policy = ChosenFFNs(
            method="random", layers=(0, 2, 3), probability=probability, warm_up_tokens=1, seed=4
        )
        report = assert_engines_agree(tiny, policy)
        assert report.skipped_blocks > 0


@pytest.mark.parametrize("model_type", ["llama", "granite", "gemma2", "opt"])
def test_surrogates_stand_in_for_skipped_ffns(model_type: str) -> None:
    model: Any = lively(model_type)
    found = locate(model)
    maps = {i: LowRank(torch.randn(3, 32), 0.1 * torch.randn(32, 3), torch.randn(32)) for i in (1, 2)}
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, max_skips=2, warm_up_tokens=1)
    results = []
    for engine in ("eager", "graph"):
        chosen = Substituted(policy, Surrogates(maps))
        with skipping(model, policy=chosen, engine=engine, architecture=found) as run:
            output = model.generate(**left_padded(ROWS), max_new_tokens=12, do_sample=False)
        results.append((output.tolist(), counts(run.report)))
    assert run.report.engine == "graph"
    assert results[0] == results[1]


def test_windows_of_the_cache_grow_with_the_text(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_step, "MIN_WINDOW", 4)
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 8)
    assert_engines_agree(tiny, SOME, max_new_tokens=40)
    tiny.set_attn_implementation("eager")
    assert_engines_agree(tiny, SOME, max_new_tokens=40)


@pytest.mark.parametrize("engine", ["graph", "recorded"])
@pytest.mark.parametrize(("prompt", "new"), [(33, 4), (40, 8), (31, 70)])
def test_a_prompt_longer_than_the_first_cache_keeps_its_steps(
    tiny: Any, engine: str, prompt: int, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache doubles, but not past what the call may need."""
    monkeypatch.setattr(graph_step, "FIRST_SLOTS", 32)
    monkeypatch.setattr(recorded_step, "FIRST_SLOTS", 32)
    rows = [[3 + n % 90 for n in range(prompt)], [5, 6, 7]]
    report = assert_engines_agree(tiny, SOME, rows, engine=engine, max_new_tokens=new)
    assert (report.prepared_passes, report.eager_passes) == (new - 1, 0)


@pytest.mark.parametrize("engine", ["graph", "recorded"])
@pytest.mark.parametrize("rows", [1, 3])
def test_beams_and_then_a_greedy_call_in_one_session(tiny: Any, engine: str, rows: int) -> None:
    """The eager pass that ends with the beams is over when a step is made."""
    results = []
    for name in ("eager", engine):
        with skipping(tiny, policy=SOME, engine=name) as run:
            outputs = [
                tiny.generate(**left_padded(ROWS[:rows]), max_new_tokens=9, do_sample=False, num_beams=beams)
                for beams in (2, 1)
            ]
        results.append(([output.tolist() for output in outputs], counts(run.report)))
    assert results[0] == results[1]
    assert (run.report.engine, run.report.prepared_passes) == (engine, 8)


def test_a_step_without_a_rule_is_the_same_step(tiny: Any) -> None:
    """What skipping gains over it is then skipping alone."""
    empty = SkipPolicy(cold_s=1, cold_e=1, threshold=0.6, warm_up_tokens=0)
    for policy in (empty, SOME):
        report = assert_engines_agree(tiny, policy)
        assert "4 layers fused" in report.engine_reason


PARTLY_TURNED = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.75}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("phi3", {}),  # q, k, v are rows of one matrix, gate and up of another
        ("phi3", {"rope_parameters": PARTLY_TURNED}),  # as in Phi-4-mini
        ("phi3", {"num_key_value_heads": 4, "resid_pdrop": 0.1}),
        ("smollm3", {}),  # each fourth layer does not turn its heads
        ("ernie4_5", {}),  # elements side by side turn together
        ("glm", {}),  # so they do, and one matrix holds gate and up alone
    ],
)
def test_families_like_llama_are_fused(model_type: str, overrides: dict[str, Any], rows: int) -> None:
    report = assert_engines_agree(attentive(lively(model_type, **overrides)), SOME, ROWS[:rows])
    assert "4 layers fused" in report.engine_reason
    assert report.skipped_blocks > 0


def test_rows_of_one_matrix_are_not_copied() -> None:
    """Weights in use are the model's own, so that neither memory nor what is changed in them counts twice."""
    found = locate(attentive(lively("phi3")))
    block, rotary = found.blocks[0], found.stack.rotary_emb
    weights = graph_ffn.fused_weights(block, 1)
    assert isinstance(weights, FFNWeights)
    attention = graph_layer.attention_weights(block, weights, rotary, 1)
    assert isinstance(attention, graph_layer.AttentionWeights)
    layer: Any = block.layer
    for matrix, parts in (
        (layer.mlp.gate_up_proj.weight, (weights.gate, weights.up)),
        (layer.self_attn.qkv_proj.weight, (attention.q, attention.k, attention.v)),
    ):
        assert torch.equal(torch.cat(parts), matrix)
        assert all(p.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr() for p in parts)


@pytest.mark.parametrize("first", [0, 3, 100])
def test_positions_may_run_ahead_of_places(tiny: Any, first: int) -> None:
    """Where a caller says so; a table of angles that ends with the cache is then of no use."""
    given: dict[str, Any] = {"position_ids": torch.arange(first, first + 6)[None], "max_new_tokens": 20}
    report = assert_engines_agree(attentive(tiny), SOME, ROWS[:1], **given)
    assert "4 layers fused" in report.engine_reason


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_biases_of_all_linears_are_added(model_type: str, rows: int) -> None:
    model: Any = attentive(lively(model_type, **{"attention_bias": True} if model_type == "llama" else {}))
    for layer in model.model.layers if model_type == "phi3" else ():  # transformers gives it none
        linear = layer.self_attn.qkv_proj
        linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.add_(torch.randn_like(parameter))
    report = assert_engines_agree(model, SOME, ROWS[:rows])
    assert "4 layers fused" in report.engine_reason


@pytest.mark.parametrize("rows", [1, 3])
def test_where_layers_are_not_fused_their_ffns_are(
    tiny: Any, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_step, "attention_weights", lambda *_: "not today")
    report = assert_engines_agree(attentive(tiny), SOME, ROWS[:rows])
    assert "4 FFNs in predicated kernels (not today)" in report.engine_reason


def test_a_rule_that_learns_is_given_f(tiny: Any) -> None:
    """Beside an FFN that is no kernel the rule is none either, and asks for f of every layer."""
    tiny.model.layers[0].mlp.gate_proj.bias = torch.nn.Parameter(torch.ones(48))
    report = assert_engines_agree(attentive(tiny), SOME)
    assert "3 layers fused, 1 as modules in IF nodes" in report.engine_reason
    assert report.skipped_blocks > 0


def test_attention_is_told_of_padding_only_where_there_is_some(
    tiny: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []
    attend = decode_attention

    def noted(*args: Any, valid: Any, **options: Any) -> Any:
        told.append(valid is not None)
        return attend(*args, valid=valid, **options)

    monkeypatch.setattr(graph_attention, "decode_attention", noted)
    results = []
    for engine in ("eager", "graph"):
        with skipping(tiny, policy=SOME, engine=engine):
            for rows in (ROWS, [ROWS[2]] * 3, ROWS):
                told.append(engine == "graph")
                output = tiny.generate(**left_padded(rows), max_new_tokens=5, do_sample=False)
                results.append(output.tolist())
    assert results[:3] == results[3:]
    steps = 4 * (4 + 2)  # layers, and passes of four steps, of which two are proven
    tried = [False] * 4  # each layer alone, when the step is made
    padded, plain = [True, *tried, *[True] * steps], [True] + [False] * 4 * 4
    assert told == [False] * 3 + padded + plain + [True] * (1 + 4 * 4)


def test_a_rule_that_learns_nothing_is_told_nothing(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*_: Any) -> None:
        raise AssertionError("it does not want to know")

    policy = ChosenFFNs(method="random", layers=(0, 2, 3), probability=0.5, warm_up_tokens=1, seed=4)
    monkeypatch.setattr(type(policy.make_rule()), "after", told)
    assert_engines_agree(tiny, policy)


def test_the_kernels_decode_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="a CPU build of torch brings no Triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(attention, "_BLOCK", 4)  # then more than one split has slots
        monkeypatch.setattr(attention, "_PROGRAMS", 12)
    small_blocks(monkeypatch)
    model = lively("llama", num_hidden_layers=2)
    few = SkipPolicy(cold_s=0, cold_e=2, threshold=-1.0, warm_up_tokens=0)
    for rows in (ROWS[:1], ROWS[:2]):
        report = assert_engines_agree(model, few, rows, max_new_tokens=3)
        assert report.skipped_per_layer == (0, 2 * len(rows))


def test_calls_one_after_the_other_use_one_step(tiny: Any) -> None:
    with skipping(tiny, policy=SOME, engine="graph") as run:
        outputs = [tiny.generate(**left_padded(ROWS), max_new_tokens=9, do_sample=False) for _ in range(2)]
        engine = run._engine
        assert isinstance(engine, GraphEngine)
        step = engine._step
        tiny.generate(**left_padded(ROWS[::-1]), max_new_tokens=5, do_sample=False)
        assert engine._step is step
    assert torch.equal(*outputs)


def test_how_far_rows_agree_is_measured(tiny: Any) -> None:
    _, alike = generated(tiny, ALWAYS, "graph")
    assert alike.row_decisions == 11 * 3
    assert alike.row_agreement == 1.0
    middling = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=0)
    _, unlike = generated(tiny, middling, "graph")
    assert 0 < unlike.row_agreement < 1
    _, single = generated(tiny, ALWAYS, "graph", ROWS[:1])
    assert single.to_dict()["row_agreement"] is None


@pytest.mark.parametrize("batch_rule", ["all", "mean"])
def test_rows_may_arm_together(tiny: Any, batch_rule: str) -> None:
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=0.6, warm_up_tokens=0)
    free, rows = generated(tiny, policy, "eager")
    end = int(free[0, -8])
    results = []
    for engine in ("eager", "graph"):
        with skipping(tiny, policy=policy, engine=engine, batch_rule=batch_rule) as run:
            output = tiny.generate(**left_padded(ROWS), max_new_tokens=12, do_sample=False, eos_token_id=end)
        results.append((output.tolist(), counts(run.report)))
    assert results[0] == results[1]
    assert run.report.row_agreement == 1.0
    assert run.report.skipped_per_layer != rows.skipped_per_layer


def test_rows_that_cannot_arm_together_are_refused(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="not one of rows, all, mean"):
        skipping(tiny, policy=SOME, batch_rule="most")
    with pytest.raises(ConfigError, match="joins the rows of a decode step"):
        skipping(tiny, policy=SOME, batch_rule="all", teacher_forced=True)


# Under generate()


class Loud(LogitsProcessor):
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids[:, -1], -10.0)


class TenTokens(StoppingCriteria):
    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 10)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 8},
        {"logits_processor": [Loud()], "repetition_penalty": 1.2},
        {"stopping_criteria": [TenTokens()]},
        {"num_return_sequences": 2, "do_sample": True},
        {"prefill_chunk_size": 2},
    ],
)
def test_what_generate_can_do_besides_it_does_here(tiny: Any, options: dict[str, Any]) -> None:
    assert_engines_agree(tiny, SOME, **options)


def test_a_streamer_gets_every_token_and_the_end(tiny: Any) -> None:
    streamer = Heard()
    output, _ = generated(tiny, SOME, "graph", ROWS[:1], streamer=streamer)
    assert streamer.seen == [*output[0].tolist(), -1]


def test_logits_are_the_eager_ones(tiny: Any) -> None:
    options: dict[str, Any] = {"output_logits": True, "return_dict_in_generate": True}
    expected, _ = generated(tiny, SOME, "eager", **options)
    output, report = generated(tiny, SOME, "graph", **options)
    torch.testing.assert_close(torch.stack(output.logits), torch.stack(expected.logits), atol=1e-4, rtol=1e-4)
    assert report.engine == "graph"


def test_a_cache_that_is_handed_out_is_not_used_again(tiny: Any) -> None:
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    with skipping(tiny, policy=SOME, engine="graph"):
        first = tiny.generate(**left_padded(ROWS[:1]), **options)
        kept = first.past_key_values.layers[0].keys.clone()
        tiny.generate(**left_padded([ROWS[2]]), **options)
        assert torch.equal(first.past_key_values.layers[0].keys, kept)


def test_in_inference_mode_and_out_of_it(tiny: Any) -> None:
    with skipping(tiny, policy=SOME, engine="graph") as run:
        with torch.inference_mode():
            inside = tiny.generate(**left_padded(ROWS), max_new_tokens=6, do_sample=False)
        outside = tiny.generate(**left_padded(ROWS), max_new_tokens=6, do_sample=False)
    assert torch.equal(inside, outside)
    assert run.report.engine == "graph"
