"""Records of question sets as text: every set, both spellings of its fields, every format."""

from __future__ import annotations

from typing import Any

import pytest

from skipcal.errors import ConfigError, Unavailable
from skipcal.text.formats import FORMATS, LABEL_PHRASE, QUESTION_SETS, Format
from skipcal.text.known import KNOWN_CORPORA, LOCAL_ONLY

GSM8K = {"question": "How many\neggs?", "answer": "She has 3 * 2 = <<3*2=6>>6 eggs.\nAll stay.\n#### 6"}
ESNLI = {"premise": "A dog runs .", "hypothesis": "An animal moves ."}
CHOICES = ["a cup", "mexico", "a diner"]
RACE = {"article": "It rained.\n\nWe stayed.", "question": "Why?", "options": CHOICES, "answer": "C"}
BLANK = {"sentence": "Ann beat Eve so _ won.", "option1": "Ann", "option2": "Eve"}

# set, a record as on the hub or in a local file, its question, its answer
RECORDS: list[tuple[str, dict[str, Any], str, str]] = [
    ("gsm8k", GSM8K, "How many eggs?", "6"),
    ("svamp", {"Body": "He had 2.", "Question": "And?", "Answer": "145.0"}, "He had 2. And?", "145"),
    ("svamp", {"body": "He had 2.", "question": "And?", "answer": 0.5}, "He had 2. And?", "0.5"),
    ("mawps", {"question": "How many?", "result": "1_000", "answer": None}, "How many?", "1000"),
    ("mawps", {"question": "How many?", "result": "1/3"}, "How many?", "1/3"),
    ("mawps", {"question": "How many?", "answer": 12.0}, "How many?", "12"),
    ("mawps", {"question": "How many?", "answer": "5.88"}, "How many?", "5.88"),
    ("esnli", {**ESNLI, "label": 2, "explanation_1": "x"},
     "Premise: A dog runs . Hypothesis: An animal moves .", "contradiction"),
    ("esnli", {**ESNLI, "label": "entailment", "explanation": "x"},
     "Premise: A dog runs . Hypothesis: An animal moves .", "entailment"),
    ("esnli", {"Sentence1": "A.", "Sentence2": "B.", "gold_label": "neutral", "Explanation_1": "x"},
     "Premise: A. Hypothesis: B.", "neutral"),
    ("anli_r1", {**ESNLI, "label": 0}, "Premise: A dog runs . Hypothesis: An animal moves .", "entailment"),
    ("anli_r3", {**ESNLI, "label": 1}, "Premise: A dog runs . Hypothesis: An animal moves .", "neutral"),
    ("commonsenseqa", {"question": "Where?", "choices": {"label": ["A", "B", "C"], "text": CHOICES},
                       "answerKey": "B"}, "Where? (A) a cup (B) mexico (C) a diner", "(B) mexico"),
    ("commonsenseqa", {"question": "Where?", "choices": CHOICES, "answer": 0},
     "Where? (A) a cup (B) mexico (C) a diner", "(A) a cup"),
    ("race", RACE, "It rained. We stayed. Why? (A) a cup (B) mexico (C) a diner", "(C) a diner"),
    ("winogrande", {**BLANK, "answer": "1"}, "Ann beat Eve so _ won. (A) Ann (B) Eve", "(A) Ann"),
    ("winogrande", {**BLANK, "answer": 2}, "Ann beat Eve so _ won. (A) Ann (B) Eve", "(B) Eve"),
    ("strategyqa", {"question": "Is it?", "answer": False, "facts": ["One.", "Two."]}, "Is it?", "no"),
    ("strategyqa", {"question": "Is it?", "answer": True, "facts": "One."}, "Is it?", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "record", "question", "answer"), RECORDS)
def test_records_of_hub_and_local_files_become_questions_and_answers(
    name: str, record: dict[str, Any], question: str, answer: str
) -> None:
    questions = QUESTION_SETS[name]
    shown = {f: questions.item(record, f).text(f) for f in ("zero-shot", "single", "in-context")}
    assert shown["zero-shot"] == f"Question: {question}\nAnswer:"
    assert shown["single"] == shown["in-context"] == f"Question: {question}\nAnswer: {answer}"


@pytest.mark.parametrize(
    ("name", "record", "rationale"),
    [
        ("gsm8k", GSM8K, "She has 3 * 2 = 6 eggs. All stay. The answer is 6."),
        ("esnli", {**ESNLI, "label": 0, "explanation": "Dogs are\nanimals ."},
         "Dogs are animals . The answer is entailment."),
        ("strategyqa", {"question": "Is it?", "answer": True, "facts": ["One.", "Two."]},
         "One. Two. The answer is yes."),
    ],
)  # fmt: skip
def test_chain_of_thought_gives_the_rationale_and_ends_in_the_label(
    name: str, record: dict[str, Any], rationale: str
) -> None:
    text = QUESTION_SETS[name].item(record, "chain-of-thought").text("chain-of-thought")
    assert text.partition("\nAnswer: ")[2] == rationale
    assert LABEL_PHRASE in text


def test_every_set_is_tested_and_can_be_had() -> None:
    assert {name for name, *_ in RECORDS} == set(QUESTION_SETS)
    assert set(QUESTION_SETS) <= set(KNOWN_CORPORA) | set(LOCAL_ONLY)
    assert not set(KNOWN_CORPORA) & set(LOCAL_ONLY)
    assert all(name == questions.name for name, questions in QUESTION_SETS.items())


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", sorted(QUESTION_SETS))
def test_chain_of_thought_needs_a_set_with_rationales(name: str, format: Format) -> None:
    questions = QUESTION_SETS[name]
    if format == "chain-of-thought" and name not in ("gsm8k", "esnli", "strategyqa"):
        with pytest.raises(ConfigError, match=r"those with them: esnli, gsm8k, strategyqa\. Take"):
            questions.check(format)
    else:
        questions.check(format)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("gsm8k", {"answer": "#### 1", "id": 3}, r"no field 'question' \(columns: answer, id\)"),
        ("svamp", {"question": "x"}, r"no field 'Body' or 'body' \(columns: question\)"),
        ("race", {}, r"no field 'article' \(columns: none\)"),
        ("gsm8k", {"question": "x", "answer": "6"}, "no '####' before its number"),
        ("gsm8k", {"question": 7, "answer": "a #### 6"}, "expected text, got 7"),
        ("esnli", {**ESNLI, "label": -1, "explanation": "x"}, "label -1 is none of 0, 1, 2"),
        ("esnli", {**ESNLI, "label": "-", "explanation": "x"}, "'-' is none of entailment"),
        ("commonsenseqa", {"question": "x", "choices": CHOICES, "answer": 3}, "not among 3 choices"),
        ("commonsenseqa", {"question": "x", "choices": 5, "answer": 3}, "cannot be read"),
        ("race", {**RACE, "answer": ""}, "expected text, got ''"),
        ("winogrande", {**BLANK, "answer": ""}, "cannot be read"),
        ("strategyqa", {"question": "x", "answer": "yes", "facts": []}, "neither true nor false"),
    ],
)
def test_a_record_that_is_not_of_the_set_is_refused_in_one_line(
    name: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(Unavailable, match=message) as refused:
        QUESTION_SETS[name].item(record, "in-context")
    assert repr(name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_rationale_may_be_missing_where_it_is_not_used() -> None:
    record = {**ESNLI, "label": 0}
    assert QUESTION_SETS["esnli"].item(record, "single").answer == "entailment"
    with pytest.raises(Unavailable, match="no field 'explanation_1' or 'explanation'"):
        QUESTION_SETS["esnli"].item(record, "chain-of-thought")
