"""Prompts made of questions: joined or one by one, by their records' own fields."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from corpus_files import Characters, jsonl, problems, sampled, text_of

from skipcal.errors import ConfigError, Unavailable
from skipcal.text.corpora import (
    resolve_corpora,
    sample_corpus,
)
from skipcal.text.formats import QUESTION_SETS


def test_joined_prompts_are_windows_over_whole_items_drawn_by_seed(tmp_path: Path) -> None:
    path = problems(tmp_path / "p.jsonl", 40)
    sample = sampled("svamp:in-context", path)
    known = [f"Question: Ann has {n} apples and eats one. Is it?\nAnswer: {n - 1}" for n in range(40)]
    for row in map(text_of, sample.prompts):
        assert len(row) == 150
        inner = row.split("\n\n")[1:-1]  # the items at the ends are cut
        assert inner
        assert set(inner) <= set(known)
        assert any(item.endswith(row.split("\n\n")[0]) for item in known)
        assert any(item.startswith(row.split("\n\n")[-1]) for item in known)
    assert (sample.documents, sample.short_documents, sample.corpus.format) == (40, 0, "in-context")
    assert sample.corpus.name == "svamp:in-context"
    assert sample.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sampled("svamp:in-context", path).prompts == sample.prompts
    assert sampled("svamp:in-context", path, seed=4).prompts != sample.prompts


def test_joined_windows_are_those_of_a_naive_construction(tmp_path: Path) -> None:
    path = problems(tmp_path / "p.jsonl", 60)
    corpus = resolve_corpora([], [f"svamp:in-context={path}"])[0]
    from datasets import load_dataset

    records = load_dataset("json", data_files=str(path), split="train", streaming=True)
    items = [
        QUESTION_SETS["svamp"].item(r, "in-context").text("in-context")
        for r in records.shuffle(seed=3, buffer_size=10_000)
    ]
    draw = random.Random(3)
    deck = draw.sample(items, len(items))
    expected = []
    for _ in range(5):
        joined = deck.pop(0)
        while len(joined) <= 150:
            joined += "\n\n" + deck.pop(0)
        start = draw.randrange(len(joined) - 150 + 1)
        expected.append(joined[start : start + 150])
    drawn = sample_corpus(corpus, Characters(), prompts=5, prompt_tokens=150, seed=3)
    assert [text_of(row) for row in drawn.prompts] == expected


def test_held_out_windows_share_no_item_with_the_others(tmp_path: Path) -> None:
    sample = sampled("svamp:in-context", problems(tmp_path / "p.jsonl", 40), prompts=8, held_out=4)
    assert (len(sample.prompts), len(sample.held_out)) == (8, 4)

    def bodies(rows: list[list[int]]) -> set[str]:
        return {item for row in rows for item in text_of(row).split("\n\n")[1:-1]}

    assert bodies(sample.prompts)
    assert bodies(sample.held_out)
    assert not bodies(sample.prompts) & bodies(sample.held_out)


def test_a_small_set_is_used_again_but_no_window_twice(tmp_path: Path) -> None:
    path = problems(tmp_path / "p.jsonl", 3)
    rows = sampled("svamp:in-context", path, prompts=12, prompt_tokens=100).prompts
    assert len({tuple(row) for row in rows}) == 12
    with pytest.raises(Unavailable, match=r"has 0 windows over joined questions of 400 tokens, 5 are"):
        sampled("svamp:in-context", path, prompt_tokens=400)


def test_zero_shot_and_single_take_the_opening_and_count_short_questions(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    bodies = ["Short." if n % 3 == 0 else f"{n} long stories follow." for n in range(12)]
    records = [{"body": body, "question": "How many?", "answer": 7} for body in bodies]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    for label, end in (("svamp:zero-shot", "Answer:"), ("svamp:single", "Answer: 7")):
        size = len(f"Question: 1 long stories follow. How many?\n{end}")
        sample = sampled(label, path, prompts=8, prompt_tokens=size)
        whole = [text_of(row) for row in sample.prompts if row[:12] != [ord("Q")]]
        assert all(row.startswith("Question: ") and "long stories follow. How many?" in row for row in whole)
        assert any(row.endswith(end) for row in whole)
        assert (sample.documents - sample.short_documents, len(sample.prompts)) == (8, 8)
        assert sample.short_documents > 0


def test_question_sets_resolve_by_name_and_format() -> None:
    plain, single = resolve_corpora(["gsm8k", "gsm8k:single"], [])
    assert (plain.name, plain.source, plain.config) == ("gsm8k", "openai/gsm8k", "main")
    assert (plain.questions, plain.format) == ("gsm8k", "in-context")
    assert (single.name, single.questions, single.format) == ("gsm8k:single", "gsm8k", "single")
    local = resolve_corpora([], ["esnli:chain-of-thought=/d/e.jsonl", "gsm8k=/d/g.jsonl", "my:own=/d/t.txt"])
    assert [(c.name, c.questions, c.format) for c in local] == [
        ("esnli:chain-of-thought", "esnli", "chain-of-thought"),
        ("gsm8k", None, None),  # as any NAME=PATH: documents with a column of text
        ("my:own", None, None),
    ]
    third = resolve_corpora(["anli_r3"], [])[0]
    assert (third.source, third.split) == ("facebook/anli", "train_r3")


@pytest.mark.parametrize(
    ("names", "files", "error", "message"),
    [
        (["gsm8k:incontext"], [], ConfigError, "'incontext' is no format; known: zero-shot, single, in-"),
        (["gsm8:single"], [], ConfigError, "'gsm8' is no question set; did you mean 'gsm8k'"),
        (["zzz:single"], [], ConfigError, "'zzz' is no question set; known: anli_r1, "),
        (["c4:single"], [], ConfigError, "'c4' is running text and has no formats; give it as c4"),
        (["svamp:chain-of-thought"], [], ConfigError, "'svamp' has no rationales"),
        ([], ["svamp:chain-of-thought=a.jsonl"], ConfigError, "'svamp' has no rationales"),
        ([], ["svamp:few=a.jsonl"], ConfigError, "'few' is no format"),
        ([], ["c4:single=a.jsonl"], ConfigError, "'c4' is running text"),
        ([], ["gsm8k:single=a.txt"], ConfigError, "is no table of questions"),
        (["gsm8k", "gsm8k"], [], ConfigError, "'gsm8k' is taken"),
        (["esnli"], [], Unavailable, "--data-files esnli:in-context=PATH.jsonl"),
        (["redpajama"], [], Unavailable, "--text-column raw_content"),
        (["oscar"], [], Unavailable, "needs a loading script"),
    ],
)
def test_names_that_mean_nothing_are_refused(
    names: list[str], files: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as refused:
        resolve_corpora(names, files)
    assert "\n" not in str(refused.value)


def test_a_question_set_of_the_hub_is_read_by_its_own_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    asked: dict[str, Any] = {}

    def load(path: str, name: str | None, **options: Any) -> Any:
        asked.update(path=path, name=name, **options)
        records = [
            {
                "sentence": f"Ann beat Eve {n} times so _ won.",
                "option1": "Ann",
                "option2": "Eve",
                "answer": "1",
            }
            for n in range(9)
        ]
        return Dataset.from_list(records).to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *a, **k: type("Info", (), {"sha": "f" * 40})()
    )
    corpus = resolve_corpora(["winogrande"], [])[0]
    sample = sample_corpus(corpus, Characters(), prompts=2, prompt_tokens=200, seed=0)
    assert (asked["path"], asked["name"], asked["split"]) == ("allenai/winogrande", "winogrande_m", "train")
    assert asked["revision"] == sample.corpus.revision == "f" * 40
    assert "so _ won. (A) Ann (B) Eve\nAnswer: (A) Ann\n\nQuestion: " in text_of(sample.prompts[0])


def test_records_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "d.jsonl", ["some text"])
    with pytest.raises(Unavailable, match=r"'svamp': a record has no field 'Body' or 'body' \(columns: text"):
        sampled("svamp:single", path)
    with pytest.raises(Unavailable, match="or read it as questions with NAME:in-context=PATH"):
        sampled("svamp", problems(tmp_path / "p.jsonl", 3))
