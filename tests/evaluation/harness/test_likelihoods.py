"""Likelihoods under a policy are those of decoding token by token."""

from __future__ import annotations

import copy
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import lively

from skipcal.arch.loading import LoadedModel
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.errors import ConfigError
from skipcal.runtime.session import skipping

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from lm_eval.models.huggingface import HFLM
from lm_eval_requests import (
    DECODE,
    FULL,
    PAIRS,
    PROMPTS,
    RANDOM,
    SHORT,
    SOME,
    TEXTS,
    ask,
    generate,
    ids,
    requests,
    stepwise,
)

from skipcal.evaluation.harness.skip_lm import SkipLM


@pytest.mark.parametrize("policy", [FULL, SOME, RANDOM, SHORT, DECODE], ids=lambda policy: policy.method)
def test_a_likelihood_is_that_of_decoding_token_by_token(loaded: LoadedModel, policy: Policy) -> None:
    for pair, (value, greedy) in zip(PAIRS, ask(SkipLM(loaded, policy, batch_size=3)), strict=True):
        expected, best = stepwise(loaded.model, policy, ids(pair[0]) or [1], ids(pair[1]))
        assert value == pytest.approx(expected, abs=1e-4)
        assert greedy is best


@pytest.mark.parametrize("family", ["gpt2", "opt", "gemma2"])
def test_other_kinds_of_positions_and_attention_score_alike(tokenizer: Any, family: str) -> None:
    model = lively(family)
    policy = SkipPolicy(cold_s=0, cold_e=4, threshold=-1.0, max_skips=2, warm_up_tokens=1)
    for pair, (value, _) in zip(PAIRS, ask(SkipLM(model, policy, tokenizer=tokenizer)), strict=True):
        expected, _ = stepwise(model, policy, ids(pair[0]) or [1], ids(pair[1]))
        assert value == pytest.approx(expected, abs=2e-3)


def test_a_continuation_that_greedy_decoding_gives_is_called_greedy(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    with skipping(model, policy=SOME):
        new = model.generate(torch.tensor([[5, 17, 31]]), max_new_tokens=6, do_sample=False)[0, 3:].tolist()
    said = "".join(f" w{token}" for token in new)
    other = said.rsplit(" ", 1)[0] + f" w{(new[-1] + 1) % 97}"
    answers = ask(SkipLM(loaded, SOME), [("w5 w17 w31", said), ("w5 w17 w31", other)])
    assert [greedy for _, greedy in answers] == [True, False]


def test_the_full_policy_is_plain_hflm_and_skipping_is_not(loaded: LoadedModel) -> None:
    # Its logits_cache reads a wrong position where one text is split at two places, as in PAIRS.
    plain = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=2, logits_cache=False)
    expected = ask(plain)
    got = ask(SkipLM(loaded, FULL, batch_size=2))
    assert [g for _, g in got] == [g for _, g in expected]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=1e-4)
    rolled = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    texts = SkipLM(loaded, FULL, batch_size=2).loglikelihood_rolling(rolled)
    assert texts == pytest.approx(plain.loglikelihood_rolling(rolled), abs=1e-3)
    assert abs(ask(SkipLM(loaded, SOME))[0][0] - expected[0][0]) > 0.01
    skipped = SkipLM(loaded, SOME).loglikelihood_rolling(rolled)
    assert all(abs(a - b) > 0.01 for a, b in zip(skipped, texts, strict=True))


def test_special_tokens_are_those_that_hflm_adds(loaded: LoadedModel, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    begun = copy.deepcopy(tokenizer)
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert begun("w5")["input_ids"] == [1, 5]
    plain = HFLM(pretrained=loaded.model, tokenizer=begun, batch_size=2, logits_cache=False)
    mine = SkipLM(replace(loaded, tokenizer=begun), FULL, batch_size=2)
    assert [v for v, _ in ask(mine)] == pytest.approx([v for v, _ in ask(plain)], abs=1e-4)
    expected, _ = stepwise(loaded.model, FULL, [1, *ids(PAIRS[0][0])], ids(PAIRS[0][1]))
    assert ask(mine)[0][0] == pytest.approx(expected, abs=1e-4)
    rolled = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    twice = mine.loglikelihood_rolling(rolled)
    assert twice == pytest.approx(plain.loglikelihood_rolling(rolled), abs=1e-3)
    expected, _ = stepwise(loaded.model, FULL, [1], [1, *ids(TEXTS[1])])
    assert twice[1] == pytest.approx(expected, abs=1e-3)
    rendered = generate(mine, [f"<s> {PROMPTS[0]}"])  # no second one where a text has it
    assert rendered == generate(plain, [f"<s> {PROMPTS[0]}"]) == generate(mine, [PROMPTS[0]])


def test_answers_of_another_opening_are_not_taken_from_the_cache(
    loaded: LoadedModel, tokenizer: Any, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    begun = copy.deepcopy(tokenizer)
    begun.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    first = ask(SkipLM(loaded, FULL, cache=tmp_path))
    other = replace(loaded, tokenizer=begun)
    assert ask(SkipLM(other, FULL, cache=tmp_path)) == ask(SkipLM(other, FULL)) != first


def test_a_batch_scores_as_its_rows_do_alone_and_keeps_their_order(loaded: LoadedModel) -> None:
    together, alone = SkipLM(loaded, SOME, batch_size=8), SkipLM(loaded, SOME, batch_size=1)
    answers = ask(together)
    assert [v for v, _ in answers] == pytest.approx([v for v, _ in ask(alone)], abs=1e-4)
    assert together.report.skipped_per_layer == alone.report.skipped_per_layer
    backwards = ask(SkipLM(loaded, SOME), PAIRS[::-1])
    assert [v for v, _ in backwards] == pytest.approx([v for v, _ in answers[::-1]], abs=1e-4)


def test_counts_are_those_of_the_continuations(loaded: LoadedModel) -> None:
    """Of n tokens the first comes from the prefill; the two that differ in one last token share a row."""
    lm = SkipLM(loaded, SOME)
    ask(lm)
    assert lm.report.decode_steps == 4 + 6 + 0 + 1 + 3
    assert lm.report.decode_steps_after_warm_up == 3 + 5 + 0 + 0 + 2
    assert lm.report.skipped_blocks > 0
    assert lm.report_on(["elsewhere"]).decode_steps == 0


def test_too_long_a_text_loses_its_beginning_and_the_prefill_shrinks(
    loaded: LoadedModel, caplog: pytest.LogCaptureFixture
) -> None:
    context, continuation = ids(TEXTS[2]), ids(TEXTS[1])
    lm = SkipLM(loaded, SOME, max_length=12)
    with caplog.at_level(logging.WARNING):
        value, _ = ask(lm, [(TEXTS[2], " " + TEXTS[1])])[0]
    assert value == pytest.approx(stepwise(loaded.model, SOME, context[-4:], continuation)[0], abs=1e-4)
    assert "t: 1 texts are longer than the model's context of 12 tokens" in caplog.text
    value, _ = ask(SkipLM(loaded, SOME, max_length=9), [(TEXTS[2], " " + TEXTS[1])])[0]
    assert value == pytest.approx(stepwise(loaded.model, SOME, context[-1:], continuation)[0], abs=1e-4)
    with pytest.raises(ConfigError, match=r"9 to score.*context of 8"):
        ask(SkipLM(loaded, SOME, max_length=8), [(TEXTS[2], " " + TEXTS[1])])


def test_each_window_of_a_rolling_text_is_a_text_of_its_own(loaded: LoadedModel) -> None:
    lm = SkipLM(loaded, SOME, max_length=16)
    value = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(TEXTS[0],)]))[0]
    tokens = ids(TEXTS[0])  # 30: a window of 16 after the prefix token, then the last 14 behind 3 others
    parts = [([1], tokens[:16]), (tokens[13:16], tokens[16:])]
    assert value == pytest.approx(sum(stepwise(loaded.model, SOME, *part)[0] for part in parts), abs=1e-4)
    assert lm.report.decode_steps == 15 + 13


@pytest.mark.parametrize(
    ("policy", "pairs", "said"),
    [
        (
            replace(SOME, warm_up_tokens=25),
            PAIRS,
            "no token came after the warm-up of 25: .*--warm-up-tokens",
        ),
        (SOME, PAIRS[2:4], "every answer is one token"),
        (replace(SOME, threshold=0.99999), PAIRS, "nothing was skipped"),
        (SOME, PAIRS, None),
        (FULL, PAIRS, None),
        (SHORT, PAIRS[2:4], None),
    ],
)
def test_numbers_of_the_full_model_are_not_passed_off_as_the_methods(
    loaded: LoadedModel, policy: Policy, pairs: Any, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        ask(SkipLM(loaded, policy), pairs)
    if said is None:
        assert caplog.text == ""
    else:
        assert len(caplog.records) == 1
        assert re.search(said, caplog.text)
