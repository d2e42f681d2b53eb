"""lm-eval under a policy: scores are those of decoding token by token, and arms never mix."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import lively
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.baselines.chosen_ffns import ChosenFFNs
from skipcal.baselines.whole_layers import ShortGPT, SkipDecode
from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.arms import Arm
from skipcal.evaluation.sweep import COLUMNS
from skipcal.runtime.greedy import until_stop
from skipcal.runtime.policy import Policy, SkipPolicy
from skipcal.runtime.session import skipping

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from skipcal.evaluation import lm_eval as ours
from skipcal.evaluation import skip_lm
from skipcal.evaluation.lm_eval import run_lm_eval
from skipcal.evaluation.skip_lm import SkipLM

FULL = SkipPolicy(cold_s=0, cold_e=0, threshold=2.0, warm_up_tokens=0)
SOME = SkipPolicy(cold_s=0, cold_e=4, threshold=0.55, warm_up_tokens=1)
RANDOM = ChosenFFNs(method="random", layers=(0, 1, 2, 3), probability=0.5, warm_up_tokens=0)
SHORT = ShortGPT(removed=(2,))
DECODE = SkipDecode(num_layers=4, max_layers=4, min_layers=2, steps=6)

PAIRS = [
    ("w5 w17 w31", " w8 w44 w9 w12 w60"),
    ("w7", " w61 w62 w63 w9 w9 w10 w11"),
    ("w60 w61 w62 w63 w64 w65", " w5"),
    ("w60 w61 w62 w63 w64 w65", " w6"),
    ("w60 w61 w62 w63 w64", " w65 w6"),
    ("", "w20 w21 w22 w23"),
]
TEXTS = [" ".join(f"w{(7 * n + k) % 90 + 5}" for n in range(length)) for k, length in enumerate((30, 9, 50))]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w96; the tiny model's first three ids are special."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names = [*special.values(), *(f"w{n}" for n in range(3, 97))]
    words = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture
def loaded(tiny: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(model=tiny, tokenizer=tokenizer, name="tiny", revision=None)


def requests(kind: Any, arguments: list[tuple[Any, ...]], task: str = "t") -> list[Instance]:
    return [Instance(kind, {}, args, 0, metadata=(task, n, 1)) for n, args in enumerate(arguments)]


def ask(lm: Any, pairs: list[tuple[str, str]] = PAIRS) -> list[tuple[float, bool]]:
    answers: list[tuple[float, bool]] = lm.loglikelihood(requests("loglikelihood", list(pairs)))
    return answers


def stepwise(model: Any, policy: Policy, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The score by a loop over tokens, with a cache."""
    total, greedy = 0.0, True
    with skipping(model, policy=policy):
        out = model(torch.tensor([context]), use_cache=True)
        for token in continuation:
            scores = out.logits[0, -1].double().log_softmax(-1)
            total += float(scores[token])
            greedy &= int(scores.argmax()) == token
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
    return total, greedy


def ids(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


# Likelihoods


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


# Generation

PROMPTS = ["w5 w17 w31 w8 w44 w9", "w7 w12", "w60 w61 w62 w63"]


def generate(lm: Any, prompts: list[str], **options: Any) -> list[str]:
    asked = [(text, {"until": [], "max_gen_toks": 12, **options}) for text in prompts]
    answers: list[str] = lm.generate_until(requests("generate_until", asked))
    return answers


def new_tokens(model: Any, policy: Policy, prompt: str, stop: int = 2, **options: Any) -> list[int]:
    """Up to and with the end of sequence, or the token of a stop word."""
    options = {"do_sample": False, "eos_token_id": [2, stop], "max_new_tokens": 12, **options}
    with skipping(model, policy=policy):
        row = torch.tensor([ids(prompt)])
        output = model.generate(row, attention_mask=torch.ones_like(row), **options)
    return until_stop(output[0, row.shape[1] :].tolist(), {2, stop})


def words(tokens: list[int], stop: int = 2) -> str:
    return " ".join(f"w{token}" for token in tokens if token > 2 and token != stop)


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
    monkeypatch.setattr(loaded.model, "forward", None)  # nothing may be run again
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


# Tasks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    items = [
        {
            "question": " ".join(f"w{(5 * n + k) % 90 + 3}" for k in range(4)),
            "choices": [" ".join(f"w{(11 * n + 7 * c + k) % 90 + 3}" for k in range(4)) for c in range(3)],
            "gold": n % 3,
            "text": " ".join(f"w{(7 * n + k * k) % 90 + 3}" for k in range(20)),
            "answer": f"w{n + 3}",
        }
        for n in range(12)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


@pytest.fixture
def tasks(data: Path) -> dict[str, dict[str, Any]]:
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data / "items.jsonl")},
            "cache_dir": str(data / "cache"),
        },
        "test_split": "test",
    }
    return {
        "choice": {
            **common,
            "task": "choice",
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "cloze": {
            **common,
            "task": "cloze",
            "output_type": "loglikelihood",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "perplexity"}],
        },
        "rolling": {
            **common,
            "task": "rolling",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "answering": {
            **common,
            "task": "answering",
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["w90"], "max_gen_toks": 6, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
            "filter_list": [
                {
                    "name": "first-word",
                    "filter": [
                        {"function": "regex", "regex_pattern": "(w[0-9]+)"},
                        {"function": "take_first"},
                    ],
                }
            ],
        },
    }


@contextlib.contextmanager
def without_defaults() -> Iterator[None]:
    """An index without lm-eval's own tasks, which take seconds to read."""

    def index(**options: Any) -> Any:
        return TaskManager(**{**options, "include_defaults": False})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ours, "TaskManager", index)
        yield


def cell(frame: pd.DataFrame, method: str, metric: str) -> Any:
    found = frame[(frame.method == method) & (frame.metric == metric)]
    assert len(found) == 1
    return found.iloc[0]


def test_policies_are_compared_on_tasks(
    loaded: LoadedModel, tasks: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policies: list[tuple[str | Arm, Policy]] = [(Arm("ffn-skip", 0.25), SOME), ("full", FULL)]
    frame = run_lm_eval(loaded, policies, list(tasks.values()), cache=tmp_path, limit=10)
    assert tuple(frame.columns) == COLUMNS
    assert capsys.readouterr().out == ""
    assert list(zip(frame.task, frame.subset, frame.metric, strict=True))[:6] == [
        ("choice", "all", "acc"),
        ("choice", "all", "acc_norm"),
        ("cloze", "all", "perplexity"),
        ("rolling", "all", "word_perplexity"),
        ("rolling", "all", "bits_per_byte"),
        ("answering", "first-word", "exact_match"),
    ]
    assert set(frame.n) == {10}
    mine, full = cell(frame, "ffn-skip", "acc"), cell(frame, "full", "acc")
    assert mine.target_skip_ratio == 0.25
    assert mine.realised_skip_ratio > 0 == full.realised_skip_ratio
    assert mine.ci_high - mine.ci_low == pytest.approx(
        2 * 1.96 * math.sqrt(mine.value * (1 - mine.value) / 9)
    )
    for metric in frame.metric.unique():
        mine, full = cell(frame, "ffn-skip", metric), cell(frame, "full", metric)
        assert mine.difference == pytest.approx(mine.value - full.value)
        assert mine.difference_ci_low <= mine.difference <= mine.difference_ci_high
        assert math.isnan(full.difference)
    assert cell(frame, "ffn-skip", "word_perplexity").difference != 0
    assert cell(frame, "full", "perplexity").ci_high > cell(frame, "full", "perplexity").value
    assert math.isnan(cell(frame, "full", "word_perplexity").ci_low)  # lm-eval has no standard error for it

    again = run_lm_eval(loaded, policies, list(tasks.values()), cache=tmp_path, limit=10)
    pd.testing.assert_frame_equal(again, frame)


def test_bars_of_the_harness_are_off_in_files_and_back_afterwards() -> None:
    modules: list[Any] = [importlib.import_module(name) for name in ("lm_eval.api.task", "tqdm")]
    before = [module.tqdm for module in modules]
    with ours._quiet_harness():
        assert all(module.tqdm.keywords == {"disable": True} for module in modules)
    assert [module.tqdm for module in modules] == before


def test_few_shot_examples_are_the_same_for_all_policies(loaded: LoadedModel, tasks: Any) -> None:
    task = {**tasks["choice"], "fewshot_split": "test"}
    same = replace(FULL, warm_up_tokens=3)
    frame = run_lm_eval(loaded, {"full": FULL, "same": same}, [task], num_fewshot=2, seed=5, limit=6)
    acc = frame[frame.metric == "acc"]
    assert acc.value.nunique() == 1
    assert (acc.difference.iloc[1], acc.difference_ci_low.iloc[1]) == (0, 0)


def test_a_group_gets_its_aggregate_and_the_counts_of_its_tasks(
    loaded: LoadedModel, tasks: Any, tmp_path: Path
) -> None:
    other = {**tasks["choice"], "task": "other", "doc_to_target": "{{(gold + 1) % 3}}"}
    group = {"group": "both", "task": ["choice", "other"], "aggregate_metric_list": [{"metric": "acc"}]}
    for name, written in (("choice", tasks["choice"]), ("other", other), ("both", group)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(written))
    with without_defaults():
        frame = run_lm_eval(
            loaded, {"full": FULL, "random": RANDOM}, ["both"], limit=4, include_path=tmp_path
        )
    row = frame[(frame.method == "random") & (frame.task == "both")].iloc[0]
    leaves = frame[(frame.method == "random") & (frame.task != "both") & (frame.metric == "acc")]
    assert row.n == 8
    assert row.value == pytest.approx(leaves.value.mean())
    assert 0 < leaves.realised_skip_ratio.min() <= row.realised_skip_ratio <= leaves.realised_skip_ratio.max()


def test_a_task_of_a_folder_runs_by_its_name(loaded: LoadedModel, tasks: Any, tmp_path: Path) -> None:
    """lm-eval's own tasks, which take seconds to index, are left alone."""
    (tmp_path / "answering.yaml").write_text(json.dumps(tasks["answering"]))
    frame = run_lm_eval(
        loaded, {"random": RANDOM}, ["answering"], include_path=tmp_path, limit=2,
        gen_kwargs={"max_gen_toks": 3},
    )  # fmt: skip
    assert list(frame.task) == ["answering"]
    assert frame.difference.isna().all()
    by_file = run_lm_eval(loaded, {"random": RANDOM}, [str(tmp_path / "answering.yaml")], limit=2)
    assert list(by_file.task) == ["answering"]


def test_a_chat_template_is_applied_where_there_is_one(loaded: LoadedModel, tasks: Any) -> None:
    assert not SkipLM(loaded, FULL).uses_chat_template
    plain = run_lm_eval(loaded, {"full": FULL}, [tasks["choice"]], limit=4)
    template = (
        "{% for m in messages %}w10 {{ m.content }}{% endfor %}{% if add_generation_prompt %} w11{% endif %}"
    )
    chat: Any = PreTrainedTokenizerFast(
        tokenizer_object=loaded.tokenizer.backend_tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
    )
    chat.chat_template = template
    lm = SkipLM(loaded.model, FULL, tokenizer=chat)
    assert lm.uses_chat_template
    assert not SkipLM(loaded.model, FULL, tokenizer=chat, chat_template=False).uses_chat_template
    seen: list[str] = []
    original = SkipLM.loglikelihood

    def spying(self: Any, asked: list[Any], disable_tqdm: bool = False) -> Any:
        seen.extend(each.args[0] for each in asked)
        return original(self, asked, disable_tqdm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SkipLM, "loglikelihood", spying)
        run_lm_eval(replace(loaded, tokenizer=chat), {"full": FULL}, [tasks["choice"]], limit=4)
    assert seen[0].startswith("w10 ")
    assert seen[0].rstrip().endswith("w11")
    assert len(plain) == 2


# Refusals


def test_what_cannot_run_is_refused(loaded: LoadedModel, tasks: Any, tmp_path: Path) -> None:
    def run(names: Any, policies: Any = None, **options: Any) -> None:
        with without_defaults():
            run_lm_eval(loaded, policies or {"full": FULL}, names, include_path=tmp_path, **options)

    (tmp_path / "answering.yaml").write_text(json.dumps(tasks["answering"]))
    with pytest.raises(ConfigError, match=r"'anwsering' is not known; did you mean 'answering'\?"):
        run(["anwsering"])
    with pytest.raises(ConfigError, match="lm-eval ls tasks"):
        run(["zzzz"])
    with pytest.raises(ConfigError, match="no lm-eval task"):
        run([])
    with pytest.raises(ConfigError, match="limit 0"):
        run(["answering"], limit=0)
    with pytest.raises(ConfigError, match="'a' twice"):
        run(["answering"], [("a", FULL), ("a", SOME)])
    with pytest.raises(ConfigError, match="no folder"):
        run_lm_eval(loaded, {"full": FULL}, ["answering"], include_path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="'choice' cannot be used"):
        run([{**tasks["choice"], "output_typ": "x"}])
    with pytest.raises(ConfigError, match="code that a model wrote"):
        run([{**tasks["answering"], "unsafe_code": True}])
    for path in ("nobody/no-such-data", str(tmp_path / "nothing")):
        with pytest.raises(Unavailable, match="the data of lm-eval task 'choice' cannot be had") as caught:
            run([{**tasks["choice"], "dataset_path": path, "dataset_kwargs": {}}])
        assert "\n" not in str(caught.value)


def test_several_processes_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="parallelize"):
        SkipLM(loaded, SOME, parallelize=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, got 2 processes"):
        SkipLM(loaded, SOME)


def test_a_model_object_needs_its_tokenizer(loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="end-of-sequence"):
        SkipLM(loaded.model, SOME)
    assert SkipLM(loaded.model, SOME, tokenizer=loaded.tokenizer).label == "ffn-skip"
    with pytest.raises(ConfigError, match="batch size 0"):
        SkipLM(loaded, SOME, batch_size=0)


def test_a_missing_library_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lm_eval", "skip_lm", "harness"):
        monkeypatch.delitem(sys.modules, f"skipcal.evaluation.{name}")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r'lm-eval is not installed; .* pip install "skipcal\[eval\]"'):
        importlib.import_module("skipcal.evaluation.lm_eval")


def test_importing_skipcal_leaves_the_library_out() -> None:
    code = "import sys, skipcal, skipcal.cli, skipcal.evaluation; assert 'lm_eval' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_the_embedded_model_skips_in_a_task(smollm: LoadedModel, tmp_path: Path) -> None:
    lines = [
        {"q": "The capital of France is", "choices": ["Paris, a city on the Seine", "the moon over the sea"]},
        {"q": "Water is made of", "choices": ["hydrogen and oxygen atoms", "wood and paper and glue"]},
    ]
    (tmp_path / "two.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = {
        "task": "two",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "two.jsonl")}, "cache_dir": str(tmp_path)},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
    }
    some = SkipPolicy(cold_s=1, cold_e=26, threshold=0.98, warm_up_tokens=1)
    frame = run_lm_eval(smollm, {"full": FULL, "ffn-skip": some}, [task], chat_template=False)
    assert cell(frame, "full", "acc").value == 1.0
    assert 0 < cell(frame, "ffn-skip", "acc").realised_skip_ratio < 1
