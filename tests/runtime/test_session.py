"""`skipping` around plain generate(): batches, beams, sampling, streaming; what its report counts."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from conftest import left_padded
from sessions import ALWAYS, FULL, ROWS, SOME, Heard, prompt
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    StaticCache,
    StoppingCriteria,
)

from skipcal.arch.check import tiny_model
from skipcal.arch.loading import LoadedModel
from skipcal.core.policy import SkipPolicy
from skipcal.errors import SessionError
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping

# Batches


def test_each_row_of_a_left_padded_batch_gets_what_it_gets_alone(tiny: Any) -> None:
    with skipping(tiny, policy=SOME) as run:
        together = tiny.generate(**prompt(ROWS), max_new_tokens=16, do_sample=False)
    reports = []
    for i, row in enumerate(ROWS):
        with skipping(tiny, policy=SOME) as alone:
            single = tiny.generate(**prompt([row]), max_new_tokens=16, do_sample=False)
        assert together[i, -16:].tolist() == single[0, -16:].tolist()
        reports.append(alone.report)
    summed = [sum(r.skipped_per_layer[layer] for r in reports) for layer in range(4)]
    assert list(run.report.skipped_per_layer) == summed
    assert run.report.decode_steps == 45
    rates = [r.skip_ratio for r in reports]
    assert len(set(rates)) > 1, "rows that all skip alike would not test the gathering"


@pytest.mark.slow
def test_unlike_rows_of_the_embedded_model_do_not_disturb_each_other(smollm: LoadedModel) -> None:
    policy = SkipPolicy(cold_s=1, cold_e=26, threshold=0.98, warm_up_tokens=2)
    texts = ["Bread rises because", "Why do the tides follow the moon, and", "Glaciers"]
    rows = [smollm.tokenizer(text)["input_ids"] for text in texts]
    model: Any = smollm.model
    with skipping(model, policy=policy) as run:
        together = model.generate(**left_padded(rows, pad=2), max_new_tokens=12, do_sample=False)
    skipped = [0] * 30
    for i, row in enumerate(rows):
        with skipping(model, policy=policy) as alone:
            single = model.generate(**left_padded([row]), max_new_tokens=12, do_sample=False)
        assert together[i, -12:].tolist() == single[0, -12:].tolist()
        skipped = [a + b for a, b in zip(skipped, alone.report.skipped_per_layer, strict=True)]
    assert list(run.report.skipped_per_layer) == skipped


def test_a_row_counts_until_its_end_of_sequence(tiny: Any) -> None:
    free = tiny.generate(**prompt(ROWS), max_new_tokens=12, do_sample=False)
    end = int(free[0, -8])  # the first row's fifth token ends it; the others go on unless they say it too
    with skipping(tiny, policy=FULL) as run:
        output = tiny.generate(**prompt(ROWS), max_new_tokens=12, do_sample=False, eos_token_id=end)
    steps = 0
    for row in output[:, 6:].tolist():
        length = row.index(end) + 1 if end in row else len(row)
        steps += length - 1
    assert run.report.decode_steps == steps < 33


def test_a_row_stopped_by_a_criterion_of_the_user_counts_until_there(tiny: Any) -> None:
    class SecondRowEnds(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            return torch.tensor([False, input_ids.shape[1] >= 9, False])

    with skipping(tiny, policy=FULL) as run:
        tiny.generate(
            **prompt(ROWS), max_new_tokens=8, do_sample=False, stopping_criteria=[SecondRowEnds()],
            eos_token_id=96, pad_token_id=95,
        )  # fmt: skip
    assert run.report.decode_steps == 7 + 2 + 7


@pytest.mark.slow
def test_a_row_stopped_by_a_string_counts_until_there(smollm: LoadedModel) -> None:
    model: Any = smollm.model
    tokenizer: Any = smollm.tokenizer
    rows = [tokenizer(text)["input_ids"] for text in ("One, two, three,", "Count: 1, 2, 3, 4,")]
    policy = SkipPolicy(cold_s=1, cold_e=26, threshold=2.0, warm_up_tokens=0)
    with skipping(model, policy=policy) as run:
        output = model.generate(
            **left_padded(rows, pad=2), max_new_tokens=10, do_sample=False, tokenizer=tokenizer,
            stop_strings=[" four"],
        )  # fmt: skip
    new = output[0, -10:].tolist()
    stopped = next(n for n in range(1, 11) if " four" in tokenizer.decode(new[:n]))
    assert run.report.decode_steps == (stopped - 1) + 9


def test_a_criterion_of_the_user_works_as_it_does_outside(tiny: Any) -> None:
    """An end-of-sequence criterion passed as an object makes generate() pad finished rows."""
    free = tiny.generate(**prompt(ROWS), max_new_tokens=12, do_sample=False)
    end = EosTokenCriteria(eos_token_id=int(free[0, -8]))
    options = {"max_new_tokens": 12, "do_sample": False, "stopping_criteria": [end]}
    plain = tiny.generate(**prompt(ROWS), **options)
    with skipping(tiny, policy=FULL) as run:
        inside = tiny.generate(**prompt(ROWS), **options)
    assert torch.equal(plain, inside)
    assert run.report.decode_steps < 33


def test_a_generation_config_is_read_as_generate_reads_it(tiny: Any) -> None:
    """What it leaves out comes from the model's own configuration; it is not changed."""
    free = tiny.generate(**prompt(ROWS), max_new_tokens=12, do_sample=False)
    tiny.generation_config.eos_token_id = int(free[0, -8])
    config = GenerationConfig(max_new_tokens=12, do_sample=False)
    before = config.to_dict()
    with skipping(tiny, policy=FULL) as by_config:
        tiny.generate(**prompt(ROWS), generation_config=config)
    with skipping(tiny, policy=FULL) as by_options:
        tiny.generate(**prompt(ROWS), max_new_tokens=12, do_sample=False)
    assert by_config.report == by_options.report
    assert by_config.report.decode_steps < 33
    assert config.to_dict() == before
    tiny.generation_config.use_cache = False
    with skipping(tiny, policy=FULL), pytest.raises(SessionError, match="use_cache"):
        tiny.generate(**prompt(ROWS), generation_config=GenerationConfig(max_new_tokens=2))


# Kinds of decoding


def test_above_one_the_threshold_is_exactly_the_full_model(tiny: Any) -> None:
    for settings in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "prefill_chunk_size": 2},
    ):
        torch.manual_seed(1)
        plain = tiny.generate(**prompt(ROWS), max_new_tokens=9, **settings)
        torch.manual_seed(1)
        with skipping(tiny, policy=FULL) as run:
            skipped = tiny.generate(**prompt(ROWS), max_new_tokens=9, **settings)
        assert torch.equal(plain, skipped)
        assert run.report.skipped_blocks == 0
        assert run.report.skip_ratio == 0.0


def test_an_empty_region_is_exactly_the_full_model(tiny: Any) -> None:
    ids = prompt(ROWS)
    plain = tiny.generate(**ids, max_new_tokens=9, do_sample=False)
    empty = SkipPolicy(cold_s=2, cold_e=2, threshold=-1.0, warm_up_tokens=0)
    with skipping(tiny, policy=empty) as run:
        assert torch.equal(plain, tiny.generate(**ids, max_new_tokens=9, do_sample=False))
    assert run.report.skipped_blocks == 0


def test_sampling_is_repeatable_and_skips(tiny: Any) -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        with skipping(tiny, policy=ALWAYS) as run:
            results.append(tiny.generate(**prompt(), max_new_tokens=9, do_sample=True, temperature=2.0))
    assert torch.equal(*results)
    assert run.report.skipped_per_layer == (0, 0, 8, 8)


def test_beams_skip_and_count_every_beam(tiny: Any) -> None:
    with skipping(tiny, policy=ALWAYS) as run:
        tiny.generate(**prompt(), max_new_tokens=6, do_sample=False, num_beams=3)
    assert run.report.decode_steps == 5 * 3
    assert run.report.skipped_per_layer == (0, 0, 15, 15)


def test_a_streamer_gets_every_token_and_the_end(tiny: Any) -> None:
    streamer = Heard()
    with skipping(tiny, policy=SOME):
        output = tiny.generate(**prompt(), max_new_tokens=9, do_sample=False, streamer=streamer)
    assert streamer.seen == [*output[0].tolist(), -1]


def test_a_static_cache_decodes_the_same(tiny: Any) -> None:
    ids = prompt(ROWS)
    with skipping(tiny, policy=SOME, engine="eager") as dynamic:
        expected = tiny.generate(**ids, max_new_tokens=9, do_sample=False)
    with skipping(tiny, policy=SOME, engine="eager") as static:
        got = tiny.generate(**ids, max_new_tokens=9, do_sample=False, cache_implementation="static")
    assert torch.equal(expected, got)
    assert static.report == dynamic.report
    assert static.report.skipped_blocks > 0


def test_a_chat_goes_on_from_a_cache_that_is_passed_in(tiny: Any) -> None:
    """The second turn's new tokens are a prefill, though the cache holds the first turn."""
    cache = DynamicCache(config=tiny.config)
    with skipping(tiny, policy=ALWAYS) as run:
        first = tiny.generate(**prompt(), max_new_tokens=4, do_sample=False, past_key_values=cache)
        longer = torch.cat([first, torch.tensor([[9]])], dim=1)
        tiny.generate(
            input_ids=longer, attention_mask=torch.ones_like(longer), max_new_tokens=5, do_sample=False,
            past_key_values=cache,
        )  # fmt: skip
    assert run.report.decode_steps == 3 + 4
    assert run.report.skipped_per_layer == (0, 0, 7, 7)


def test_a_hand_written_loop_equals_generate(tiny: Any) -> None:
    ids = prompt()["input_ids"]
    with skipping(tiny, policy=SOME) as generated:
        expected = tiny.generate(**prompt(), max_new_tokens=9, do_sample=False)
    with skipping(tiny, policy=SOME) as looped:
        out = tiny(ids, use_cache=True)
        tokens = [out.logits[:, -1].argmax(-1, keepdim=True)]
        for _ in range(8):
            out = tiny(tokens[-1], past_key_values=out.past_key_values, use_cache=True)
            tokens.append(out.logits[:, -1].argmax(-1, keepdim=True))
    assert torch.equal(torch.cat([ids, *tokens], dim=1), expected)
    assert looped.report == generated.report


def test_a_loop_whose_prefill_ran_before_the_session_counts_from_there(tiny: Any) -> None:
    policy = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=3)
    out = tiny(prompt()["input_ids"], use_cache=True)
    with skipping(tiny, policy=policy) as run:
        for token in range(5):
            out = tiny(torch.tensor([[token + 3]]), past_key_values=out.past_key_values, use_cache=True)
    assert run.report.decode_steps == 5
    assert run.report.skipped_per_layer == (0, 0, 2, 2)


def test_an_ffn_that_returns_router_scores_keeps_its_return_type() -> None:
    model: Any = tiny_model("gpt_oss", num_local_experts=4, num_experts_per_tok=2)
    with skipping(model, policy=ALWAYS) as run:
        model.generate(**prompt(), max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert run.report.skipped_per_layer == (0, 0, 5, 5)


def test_input_embeddings_instead_of_ids(tiny: Any) -> None:
    inputs = prompt()
    embedded = tiny.get_input_embeddings()(inputs["input_ids"])
    with skipping(tiny, policy=SOME) as by_ids:
        expected = tiny.generate(**inputs, max_new_tokens=6, do_sample=False)
    with skipping(tiny, policy=SOME) as by_embeddings:
        got = tiny.generate(
            inputs_embeds=embedded, attention_mask=inputs["attention_mask"], max_new_tokens=6, do_sample=False
        )
    assert got[0].tolist() == expected[0, 6:].tolist()
    assert by_embeddings.report == by_ids.report


# The report


def test_bytes_not_read_count_blocks_that_every_row_skipped(tiny: Any) -> None:
    with skipping(tiny, policy=ALWAYS) as run:
        tiny.generate(**prompt(ROWS), max_new_tokens=5, do_sample=False)
    layer = tiny.model.layers[0]
    block = sum(p.numel() * 4 for m in (layer.mlp, layer.post_attention_layernorm) for p in m.parameters())
    assert run.report.weight_bytes_saved == 4 * 2 * block  # 4 steps, layers 2 and 3, once for all rows
    assert run.report.skipped_blocks == 3 * 4 * 2
    assert run.report.skip_ratio == pytest.approx(24 / (4 * 12))


def test_within_the_warm_up_there_is_no_ratio(tiny: Any) -> None:
    policy = SkipPolicy(cold_s=1, cold_e=4, threshold=-1.0, warm_up_tokens=50)
    with skipping(tiny, policy=policy) as run:
        tiny.generate(**prompt(), max_new_tokens=5, do_sample=False)
    assert run.report.decode_steps == 4
    assert run.report.decode_steps_after_warm_up == 0
    document = run.report.to_dict()
    assert document["skip_ratio"] is None
    assert document["skip_ratio_all"] == 0.0
    assert document["engine"] == "eager"
    assert "takes over after 100" in document["engine_reason"]


def test_a_session_without_decoding_says_so(tiny: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), skipping(tiny, policy=SOME):
        tiny(prompt()["input_ids"])
    assert "no decode step" in caplog.text


@pytest.mark.slow
def test_a_profile_drives_a_session(smollm: LoadedModel, smollm_profile: SkipProfile) -> None:
    model: Any = smollm.model
    inputs = smollm.tokenizer("A guild was", return_tensors="pt")
    with skipping(model, smollm_profile, target_skip_ratio=0.05) as run:
        model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert run.policy == smollm_profile.policy_for(smollm_profile.operating_points[0].target_skip_ratio)
    assert run.report.decode_steps == 11


def test_a_skipped_block_of_a_tiny_gpt2_adds_nothing() -> None:
    """With all FFNs but the first left out by hand, the logits are the skipping ones."""
    model: Any = tiny_model("gpt2")
    ids = torch.tensor([[5, 6, 7, 8]])
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, warm_up_tokens=0)
    with skipping(model, policy=policy, teacher_forced=True) as run:
        skipped = model(ids, use_cache=False).logits
    assert run.report.skipped_per_layer == (0, 3, 3, 3)
    for block in model.transformer.h[1:]:
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
    # the first position is the prompt and keeps its FFNs, so later ones attend to other keys
    without = model(ids, use_cache=False).logits
    assert not torch.allclose(skipped[:, 0], without[:, 0])
    with skipping(model, policy=policy, teacher_forced=True):
        assert torch.allclose(model(ids, use_cache=False).logits, without, atol=1e-6)


def test_static_cache_class_is_accepted_in_a_hand_written_loop(tiny: Any) -> None:
    cache = StaticCache(config=tiny.config, max_cache_len=16)
    ids = prompt()["input_ids"]
    with skipping(tiny, policy=ALWAYS) as run:
        tiny(ids, past_key_values=cache, use_cache=True)
        tiny(torch.tensor([[4]]), past_key_values=cache, use_cache=True)
    assert run.report.skipped_per_layer == (0, 0, 1, 1)
