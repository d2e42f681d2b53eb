"""Answers generated under a policy, and the cache that never mixes two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.core.policy import Policy
from skipcal.errors import ConfigError

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
from lm_eval.api.model import CachingLM
from lm_eval_requests import (
    FULL,
    PROMPTS,
    RANDOM,
    SHORT,
    SOME,
    TEXTS,
    ask,
    generate,
    new_tokens,
    requests,
    words,
)

from skipcal.evaluation.harness import skip_lm
from skipcal.evaluation.harness.skip_lm import SkipLM
from skipcal.runtime.session import skipping


@pytest.mark.parametrize("policy", [FULL, SOME, RANDOM, SHORT], ids=lambda policy: policy.method)
def test_answers_are_those_of_generate_inside_skipping(loaded: LoadedModel, policy: Policy) -> None:
    for size in (1, 3):
        answers = generate(SkipLM(loaded, policy, batch_size=size), PROMPTS)
        assert answers == [words(new_tokens(loaded.model, policy, text)) for text in PROMPTS]


def test_a_row_ends_and_counts_until_its_stop_sequence(loaded: LoadedModel) -> None:
    """Of a batch, too, where the others go on."""
    stop = new_tokens(loaded.model, SOME, PROMPTS[0])[2]
    assert stop > 9, "a word that others begin with would end them"
    expected = [new_tokens(loaded.model, SOME, text, stop) for text in PROMPTS]
    lm = SkipLM(loaded, SOME, batch_size=3)
    answers = generate(lm, PROMPTS, until=[f"w{stop}"])
    assert [text.strip() for text in answers] == [words(row, stop) for row in expected]
    assert lm.report.decode_steps == sum(map(len, expected)) - 3 < 33
    alone = SkipLM(loaded, SOME, batch_size=1)
    assert generate(alone, PROMPTS, until=[f"w{stop}"]) == answers
    assert alone.report.skipped_per_layer == lm.report.skipped_per_layer


def test_all_batches_are_one_session(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an engine prepares its steps once; the counts are still each batch's own."""
    opened: list[Any] = []

    def noted(*args: Any, **options: Any) -> Any:
        opened.append(skipping(*args, **{**options, "engine": "recorded"}))
        return opened[-1]

    lm = SkipLM(loaded, SOME, batch_size=1)
    expected = generate(lm, PROMPTS)
    monkeypatch.setattr(skip_lm, "skipping", noted)
    recorded = SkipLM(loaded, SOME, batch_size=1)
    opened.clear()
    assert generate(recorded, PROMPTS) == expected
    assert recorded.report.counts() == {
        **lm.report.counts(), "prepared_passes": lm.report.eager_passes, "eager_passes": 0
    }  # fmt: skip
    (session,) = opened
    assert session.report.prepared_passes == recorded.report.prepared_passes > len(PROMPTS)


def test_sampling_and_beams_are_passed_on(loaded: LoadedModel) -> None:
    lm = SkipLM(loaded, SOME, batch_size=1)
    torch.manual_seed(3)
    sampled = generate(lm, PROMPTS[:1], do_sample=True, temperature=3.0, top_k=0)
    torch.manual_seed(3)
    options: dict[str, Any] = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    assert sampled == [words(new_tokens(loaded.model, SOME, PROMPTS[0], **options))]
    assert sampled != [words(new_tokens(loaded.model, SOME, PROMPTS[0]))]
    beams = generate(lm, PROMPTS, num_beams=3)
    assert beams == [words(new_tokens(loaded.model, SOME, text, num_beams=3)) for text in PROMPTS]


def test_more_new_tokens_than_the_context_holds_are_refused_in_one_line(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"cannot run t: .*max tokens to generate"):
        generate(SkipLM(loaded, SOME), PROMPTS, max_gen_toks=256)


def test_nothing_is_left_on_model_and_tokenizer(loaded: LoadedModel) -> None:
    model: Any = loaded.model
    loaded.tokenizer.pad_token = None

    def state() -> list[Any]:
        return [(n, sorted(m.__dict__), len(m._forward_pre_hooks)) for n, m in model.named_modules()]

    row = torch.tensor([[5, 17, 31]])
    before, logits = state(), model(row).logits
    lm = SkipLM(loaded, SOME)
    ask(lm)
    generate(lm, PROMPTS)
    assert state() == before
    assert torch.equal(model(row).logits, logits)
    assert loaded.tokenizer.pad_token is None


# The cache


def test_policies_do_not_share_answers_and_a_second_run_takes_its_own(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(policy: Policy) -> tuple[Any, SkipLM]:
        lm = SkipLM(loaded, policy, cache=tmp_path, label="same", architecture=architecture)
        rolled = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
        return (ask(lm), generate(lm, PROMPTS), lm.loglikelihood_rolling(rolled)), lm

    architecture = locate(loaded.model)
    full, _ = run(FULL)
    some, first = run(SOME)
    assert full != some
    assert len(list(tmp_path.iterdir())) == 2

    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing may be run again")

    monkeypatch.setattr(loaded.model, "forward", never)
    again, second = run(SOME)
    assert again == some
    assert second.report == first.report
    assert second.report.skipped_blocks > 0
    assert all(isinstance(answer, tuple) for answer in again[0])


def test_an_interrupted_run_goes_on_where_it_was(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(skip_lm, "BATCHES_PER_SAVE", 1)
    options: dict[str, Any] = {"batch_size": 2, "architecture": locate(loaded.model)}
    expected = ask(SkipLM(loaded, SOME, **options))
    forward, passes = loaded.model.forward, []

    def failing(*args: Any, **kwargs: Any) -> Any:
        passes.append(1)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(loaded.model, "forward", failing)
    with pytest.raises(KeyboardInterrupt):
        ask(SkipLM(loaded, SOME, cache=tmp_path, **options))
    answers = ask(SkipLM(loaded, SOME, cache=tmp_path, **options))
    assert [v for v, _ in answers] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert len(passes) == 4


def test_sampled_answers_are_not_kept(loaded: LoadedModel, tmp_path: Path) -> None:
    answers = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        lm = SkipLM(loaded, SOME, cache=tmp_path)
        answers += generate(lm, [PROMPTS[0], PROMPTS[0]], do_sample=True, temperature=3.0)
    assert len(set(answers)) == 4


def test_the_harness_own_cache_is_refused(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="use_cache"):
        CachingLM(SkipLM(loaded, SOME), str(tmp_path / "cache.db"))
