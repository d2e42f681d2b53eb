"""Tasks over answers: reading their items, batching, scoring."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcal.configs.sweep import BenchSettings, ContinuationSettings, QuestionSettings, SummarySettings
from skipcal.core.policy import Policy
from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.tasks.answers import Subject, answers
from skipcal.evaluation.tasks.continuation import load_continuation
from skipcal.evaluation.tasks.freebaseqa import load_freebaseqa, read_questions
from skipcal.evaluation.tasks.mtbench import load_mtbench
from skipcal.evaluation.tasks.summarization import Story, load_summarization
from skipcal.profiles.methods import Ask, make_policy
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.session import skipping


@pytest.fixture
def policy(profile: SkipProfile) -> Policy:
    return make_policy("ffn-skip", profile, Ask(target_skip_ratio=0.25, new_tokens=12, warm_up_tokens=2))


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# Answers


def test_batched_answers_are_those_of_each_prompt_alone(subject: Subject, policy: Policy) -> None:
    prompts = {f"p{n}": torch.randint(3, 97, (n,)).tolist() for n in (3, 9, 5, 4, 7)}
    batched = [
        answer
        for group, _ in answers(subject, policy, prompts, new_tokens=12, batch_size=2)
        for answer in group
    ]
    assert [answer.id for answer in batched] == ["p9", "p7", "p5", "p4", "p3"]  # the longest first
    model: Any = subject.loaded.model
    for answer in batched:
        ids = torch.tensor([prompts[answer.id]])
        with skipping(model, policy=policy):
            alone = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
            )
        assert answer.tokens == alone[0, ids.shape[1] :].tolist()
        assert answer.text == subject.loaded.tokenizer.decode(answer.tokens, skip_special_tokens=True)


def test_each_batch_is_counted_for_itself(subject: Subject, policy: Policy) -> None:
    """All batches run in one session, whose engine need not begin anew."""
    prompts = {f"p{n}": torch.randint(3, 97, (n,)).tolist() for n in (3, 9, 5)}
    for engine in ("eager", "recorded"):
        chosen = replace(subject, engine=engine)
        together = list(answers(chosen, policy, prompts, new_tokens=12, batch_size=1))
        for (answer,), report in together:
            only = {answer.id: prompts[answer.id]}
            (((alone,), expected),) = answers(subject, policy, only, new_tokens=12, batch_size=1)
            assert answer == alone
            assert report.engine == engine
            passes = {"prepared_passes": 11, "eager_passes": 0}
            if engine == "eager":
                passes = {"prepared_passes": 0, "eager_passes": 11}
            assert report.counts() == expected.counts() | passes
            assert report.skipped_blocks > 0


def test_an_answer_ends_with_its_end_of_sequence(subject: Subject, policy: Policy) -> None:
    model: Any = subject.loaded.model
    prompts = {"p": [5, 9, 31, 7]}
    ((free,), _), = answers(subject, policy, prompts, new_tokens=12, batch_size=2)  # fmt: skip
    try:
        model.generation_config.eos_token_id = free.tokens[4]
        ((ended,), report), = answers(subject, policy, prompts, new_tokens=12, batch_size=2)  # fmt: skip
    finally:
        model.generation_config.eos_token_id = None
    stop = free.tokens.index(free.tokens[4])
    assert ended.tokens == free.tokens[: stop + 1]
    assert report.decode_steps == stop


def test_a_prompt_beyond_the_context_is_refused(subject: Subject, policy: Policy) -> None:
    with pytest.raises(ConfigError, match=r"item 'long' has 250 tokens, and 12 more do not fit .* 256"):
        list(answers(subject, policy, {"long": [3] * 250}, new_tokens=12, batch_size=1))


# FreebaseQA


def test_questions_are_drawn_by_seed(subject: Subject, questions: Path) -> None:
    def load(items: int | None, seed: int) -> list[str]:
        settings = QuestionSettings(data_file=str(questions), items=items)
        return list(load_freebaseqa(settings, subject, seed).ids)

    assert load(None, 0) == [f"q{n}" for n in range(7)]
    assert load(3, 0) == load(3, 0) and len(load(3, 0)) == 3
    assert {tuple(load(3, seed)) for seed in range(8)} != {tuple(load(3, 0))}
    with pytest.raises(Unavailable, match="has 7 items, 8 are wanted"):
        load(8, 0)


def test_the_releases_json_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "FreebaseQA-eval.json"
    parses = [{"Answers": [{"AnswersName": ["Ike", "Dwight"]}, {"AnswersName": ["Ike"]}]}]
    entry = {"Question-ID": "FreebaseQA-eval-0", "RawQuestion": "Who won?", "Parses": parses}
    path.write_text(json.dumps({"Dataset": "FreebaseQA-eval", "Questions": [entry]}))
    found = read_questions(path)
    assert found["FreebaseQA-eval-0"].text == "Who won?"
    assert found["FreebaseQA-eval-0"].aliases == ("Ike", "Dwight")
    path.write_text(json.dumps({"Questions": [{"RawQuestion": "Who?"}]}))
    with pytest.raises(Unavailable, match="question 0: field 'Parses' is missing"):
        read_questions(path)
    path.write_text("[]")
    with pytest.raises(Unavailable, match="not the release of FreebaseQA"):
        read_questions(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"id": "a", "question": "q"}'], "question 'a' has no answers"),
        (['{"id": "a", "question": "q", "answers": []}'], "question 'a' has no answers"),
        (['{"id": "a", "question": "q", "answers": "yes"}'], "question 'a' has no answers"),
        (['{"id": "a", "question": "q", "answers": ["x", " "]}'], "question 'a' has an empty answer"),
        (['{"id": "a", "question": "  ", "answers": ["x"]}'], "expected text in field 'question'"),
        (
            ['{"id": "a", "answers": ["x"]}'],
            r"expected text in field 'question', got None \(fields: answers, id\)",
        ),
        (['{"id": "a", "question": "q", "answers": ["x"]}'] * 2, ":2: the id 'a' stands there twice"),
        (["not json"], ":1 is no JSON object"),
        (["[1]"], ", entry 1 is no JSON object"),
        ([""], "holds no question"),
    ],
)
def test_questions_that_would_make_a_wrong_number_are_refused(
    tmp_path: Path, rows: list[str], message: str
) -> None:
    with pytest.raises(Unavailable, match=message):
        read_questions(write(tmp_path / "q.jsonl", *rows))


def test_files_that_are_not_there_are_named(tmp_path: Path, subject: Subject) -> None:
    with pytest.raises(Unavailable, match=r"no\.jsonl cannot be read"):
        read_questions(tmp_path / "no.jsonl")
    with pytest.raises(Unavailable, match=r"no\.json cannot be read"):
        read_questions(tmp_path / "no.json")
    with pytest.raises(Unavailable, match="--data-files freebaseqa=PATH"):
        load_freebaseqa(QuestionSettings(), subject, 0)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(Unavailable, match=r"bad\.parquet could not be read"):
        load_summarization(SummarySettings(data_file=str(tmp_path / "bad.parquet")), subject, 0)


def test_exact_match_and_its_kin(subject: Subject, questions: Path) -> None:
    task = load_freebaseqa(QuestionSettings(data_file=str(questions)), subject, 0)
    full = {"id": "q3", "text": "w3", "tokens": [3]}
    said = {"id": "q3", "text": "it is w3", "tokens": [1, 2, 3]}
    metrics = {name: share.value for (subset, name), share in task.metrics(said, full).items()}
    assert metrics == {
        "exact_match": 0.0, "contains_answer": 1.0, "repetition": 0.0, "collapse_rate": 0.0,
        "token_agreement": 0.0, "common_prefix_tokens": 0.0,
    }  # fmt: skip
    assert task.metrics(full, full)["all", "exact_match"].value == 1.0


# Summaries


def stories(path: Path, counts: dict[int, int]) -> Path:
    rows = [
        {
            "id": f"{words}-{n}",
            "article": " ".join(f"w{(n + k) % 97}" for k in range(words)),
            "highlights": "w1 w2",
        }
        for words, count in counts.items()
        for n in range(count)
    ]
    return write(path, *rows)


@pytest.mark.parametrize(
    ("words", "bucket"), [(1, "small"), (470, "small"), (471, "medium"), (789, "medium"), (790, "large")]
)
def test_buckets_by_words(words: int, bucket: str) -> None:
    assert Story("x " * words, "y").bucket == bucket


@pytest.fixture
def long_context(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> Subject:
    """The model says that it takes articles."""
    monkeypatch.setattr(subject.loaded.model.config, "max_position_embeddings", 4096)
    return subject


def test_items_are_drawn_from_each_bucket(tmp_path: Path, long_context: Subject) -> None:
    subject = long_context
    path = stories(tmp_path / "s.jsonl", {100: 4, 500: 3, 900: 5})
    task = load_summarization(SummarySettings(data_file=str(path), items=2, warm_up_tokens=2), subject, 0)
    assert (
        sorted(story.bucket for story in task.items.values())
        == ["large"] * 2 + ["medium"] * 2 + ["small"] * 2
    )
    with pytest.raises(Unavailable, match="3 articles in bucket 'medium', 4 are wanted"):
        load_summarization(SummarySettings(data_file=str(path), items=4), subject, 0)


def test_an_item_that_does_not_fit_is_refused_before_any_answer(tmp_path: Path, subject: Subject) -> None:
    path = stories(tmp_path / "s.jsonl", {100: 1, 500: 1, 900: 1})
    with pytest.raises(ConfigError, match=r"item '500-0' has \d+ tokens, and 40 more do not fit the model's"):
        load_summarization(
            SummarySettings(data_file=str(path), items=1, new_tokens=40, warm_up_tokens=2), subject, 0
        )
    question = write(tmp_path / "q.jsonl", {"id": "a", "question": "w3 " * 300, "answers": ["w4"]})
    with pytest.raises(ConfigError, match=r"item 'a' has \d+ tokens, and 8 more do not fit the model's"):
        load_freebaseqa(QuestionSettings(data_file=str(question), new_tokens=8, warm_up_tokens=2), subject, 0)
    prompts = ContinuationSettings(
        prompts=2, prompt_tokens=200, new_tokens=57, warm_up_tokens=2, data_files=[str(path)]
    )
    with pytest.raises(
        ConfigError, match="has 200 tokens, and 57 more do not fit the model's context of 256"
    ):
        load_continuation(prompts.model_copy(update={"text_column": "article"}), subject, 0)


def test_summaries_carry_rouge_and_copy_rate(tmp_path: Path, long_context: Subject, policy: Policy) -> None:
    subject = long_context
    path = stories(tmp_path / "s.jsonl", {100: 1, 500: 1, 900: 1})
    task = load_summarization(
        SummarySettings(data_file=str(path), items=1, new_tokens=40, warm_up_tokens=2), subject, 0
    )
    ((record,), report), = task.run(subject, policy, ["100-0"], 4)  # fmt: skip
    assert set(record) == {"id", "text", "tokens", "rouge1", "rouge2", "rougeL", "copy_rate"}
    assert report.decode_steps == 39
    metrics = task.metrics(record, record)
    assert metrics["small", "rougeL"] == metrics["all", "rougeL"]
    assert ("medium", "rougeL") not in metrics


# MT-Bench


def bench(path: Path, **changes: Any) -> Path:
    row = {"question_id": 81, "category": "writing", "turns": ["w3 w4 w5", "w6 w7"], **changes}
    return write(path, row, {**row, "question_id": 82, "category": "math", "turns": ["w8", "w9"]})


def test_the_second_turn_follows_the_models_own_answer(
    tmp_path: Path, subject: Subject, policy: Policy
) -> None:
    path = bench(tmp_path / "b.jsonl")
    task = load_mtbench(BenchSettings(data_file=str(path), new_tokens=12, warm_up_tokens=2), subject, 0)
    (records, report), = task.run(subject, policy, task.ids, 4)  # fmt: skip
    record = next(r for r in records if r["id"] == "81")
    encode: Any = subject.loaded.tokenizer
    talk = encode("w3 w4 w5\n\n" + record["answers"][0] + "\n\nw6 w7")["input_ids"]
    ((second,), _), = answers(subject, policy, {"x": talk}, new_tokens=12, batch_size=1)  # fmt: skip
    assert record["answers"][1] == second.text
    assert record["tokens"][12:] == second.tokens
    assert report.decode_steps == 2 * 2 * 11
    assert task.metrics(record, record)["writing", "token_agreement"].value == 1.0


def test_references_go_with_their_questions(tmp_path: Path, subject: Subject) -> None:
    references = write(
        tmp_path / "r.jsonl", {"question_id": 82, "choices": [{"index": 0, "turns": ["one", "two"]}]}
    )
    settings = BenchSettings(
        data_file=str(bench(tmp_path / "b.jsonl")),
        reference_file=str(references),
        new_tokens=12,
        warm_up_tokens=2,
    )
    task = load_mtbench(settings, subject, 0)
    assert task.items["82"].references == ("one", "two")
    assert task.items["81"].references is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"turns": ["only one"]}, "expected two turns of text"),
        ({"turns": "text"}, "expected two turns of text"),
        ({"category": None}, "expected text in field 'category'"),
        ({"question_id": 82}, ":2: the id '82' stands there twice"),
    ],
)
def test_bench_questions_that_cannot_be_asked_are_refused(
    tmp_path: Path, subject: Subject, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unavailable, match=message):
        load_mtbench(
            BenchSettings(data_file=str(bench(tmp_path / "b.jsonl", **changes)), warm_up_tokens=2), subject, 0
        )


def test_two_turns_that_cannot_fit_are_refused_before_any_answer(tmp_path: Path, subject: Subject) -> None:
    settings = BenchSettings(data_file=str(bench(tmp_path / "b.jsonl")), new_tokens=130, warm_up_tokens=2)
    with pytest.raises(ConfigError, match=r"question 81 may take 265 tokens .* context of 256"):
        load_mtbench(settings, subject, 0)
