from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from skipcal.errors import ConfigError, Unavailable
from skipcal.evaluation.judge.prompts import (
    load_judge_prompts,
    pair_outcome,
    pair_requests,
    rating_requests_mtbench,
    rating_requests_summary,
)
from skipcal.evaluation.judge.verdicts import JudgeRequest, Verdict, Winner

NASTY = "{answer} {0} {{x}} {} }{ %s \\1"


def entry(name: str, template: str) -> dict[str, Any]:
    """A line as FastChat's file has them."""
    pair = name.startswith("pair")
    return {
        "name": name,
        "type": "pairwise" if pair else "single",
        "system_prompt": f"system of {name}",
        "prompt_template": template,
        "description": "",
        "category": "general",
        "output_format": "[[A]]" if pair else "[[rating]]",
    }


TWO_TURNS = "1 {question_1} 1a {answer_1} 2 {question_2} 2a {answer_2}"
ENTRIES = [
    entry("single-v1", "Q {question} A {answer} {{kept}}"),
    entry("single-math-v1", "Q {question} R {ref_answer_1} A {answer}"),
    entry("single-v1-multi-turn", TWO_TURNS),
    entry("single-math-v1-multi-turn", TWO_TURNS + " R {ref_answer_1} {ref_answer_2}"),
    entry("pair-v2", "Q {question} A {answer_a} B {answer_b}"),
    entry("pair-math-v1", "Q {question} R {ref_answer_1} A {answer_a} B {answer_b}"),
    {**entry("pair-v1", "not {used} here"), "output_format": "[[rating_a,rating_b]]"},
]


def write(path: Path, entries: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in entries))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "judge_prompts.jsonl", ENTRIES)


def mtbench(references: list[str] | None = None, **options: Any) -> list[JudgeRequest]:
    return rating_requests_mtbench(81, "math", ["T1", "T2"], ["A1", NASTY], references, **options)


def test_mtbench_asks_for_a_rating_of_each_turn() -> None:
    first, second = mtbench()
    assert (first.id, second.id) == ("81/turn1", "81/turn2")
    assert first.form == second.form == "rating"
    assert "T1" in first.user and "A1" in first.user and "T2" not in first.user
    positions = [second.user.index(text) for text in ("T1", "A1", "T2", NASTY)]
    assert positions == sorted(positions)


def test_references_are_shown_where_they_are_given() -> None:
    first, second = mtbench(["R1", "R2"])
    assert "R1" in first.user and "R2" not in first.user
    assert "R1" in second.user and "R2" in second.user
    assert "reference" not in mtbench()[0].user + mtbench()[1].user


@pytest.mark.parametrize(
    ("turns", "answers", "references", "says"),
    [
        (["T1"], ["A1", "A2"], None, "1 turns"),
        (["T1", "T2"], ["A1"], None, "1 answers"),
        (["T1", "T2"], ["A1", "A2"], ["R1"], "1 references"),
    ],
)
def test_mtbench_needs_two_of_each(
    turns: list[str], answers: list[str], references: list[str] | None, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"question 81 has {says}"):
        rating_requests_mtbench(81, "math", turns, answers, references)


def test_a_summary_is_rated_for_four_qualities() -> None:
    requests = rating_requests_summary("cnn7", "The article {x}.", NASTY)
    assert [r.id for r in requests] == [
        f"cnn7/{q}" for q in ("coherence", "consistency", "fluency", "relevance")
    ]
    assert len({r.prompt_sha256 for r in requests}) == 4
    for request in requests:
        assert request.form == "rating"
        assert request.id.split("/")[1] in request.user
        assert "The article {x}." in request.user and NASTY in request.user


@pytest.mark.parametrize("reference", [None, "R1"])
def test_pairs_are_asked_in_both_orders(reference: str | None) -> None:
    ab, ba = pair_requests("q1", "Q?", "FIRST", "SECOND", reference=reference)
    assert (ab.id, ba.id, ab.form, ba.form) == ("q1/ab", "q1/ba", "pair", "pair")
    assert ab.user.index("FIRST") < ab.user.index("SECOND")
    assert ba.user.index("SECOND") < ba.user.index("FIRST")
    assert ("R1" in ab.user) == ("R1" in ba.user) == (reference is not None)


@pytest.mark.parametrize("fields", ["[[7]]", "[[A]]", "{", "}"])
def test_our_prompts_hold_no_verdict_and_no_unfilled_field(fields: str) -> None:
    ratings = [
        *rating_requests_mtbench(1, "c", ["", ""], ["", ""], None),
        *rating_requests_mtbench(1, "c", ["", ""], ["", ""], ["", ""]),
        *rating_requests_summary("s", "", ""),
    ]
    assert not any(fields in request.user for request in ratings)


@pytest.mark.parametrize(
    ("ab", "ba", "outcome"),
    [
        ("A", "B", "first"),
        ("B", "A", "second"),
        ("A", "A", "tie"),
        ("B", "B", "tie"),
        ("tie", "tie", "tie"),
        ("A", "tie", "tie"),
        ("tie", "A", "tie"),
        (None, "B", None),
        ("A", None, None),
        (None, None, None),
    ],
)
def test_a_side_wins_only_in_both_orders(ab: Winner | None, ba: Winner | None, outcome: str | None) -> None:
    verdicts = [Verdict(key, None, winner, "", 1) for key, winner in (("q/ab", ab), ("q/ba", ba))]
    assert pair_outcome(*verdicts) == outcome


def test_fastchat_prompts_are_used_as_they_stand(file: Path) -> None:
    prompts = load_judge_prompts(file)
    first, second = mtbench(prompts=prompts)
    assert (first.system, first.user) == ("system of single-v1", "Q T1 A A1 {kept}")
    assert second.user == f"1 T1 1a A1 2 T2 2a {NASTY}"
    first, second = mtbench(["R1", NASTY], prompts=prompts)
    assert first.user == "Q T1 R R1 A A1"
    assert second.user == f"1 T1 1a A1 2 T2 2a {NASTY} R R1 {NASTY}"
    assert [r.user for r in pair_requests("q", "Q?", "{a}", "b", prompts=prompts)] == [
        "Q Q? A {a} B b",
        "Q Q? A b B {a}",
    ]
    math = pair_requests("q", "Q?", "a", "b", reference="r", prompts=prompts)[0]
    assert (math.system, math.user) == ("system of pair-math-v1", "Q Q? R r A a B b")


def test_a_file_may_bring_its_own_summary_prompt(tmp_path: Path, file: Path) -> None:
    template = "{quality} {definition} {article} {summary}"
    own = write(tmp_path / "own.jsonl", [*ENTRIES, entry("summary", template)])
    ours, theirs = (
        rating_requests_summary("s", "ART", "SUM", load_judge_prompts(path))[0] for path in (file, own)
    )
    assert ours == rating_requests_summary("s", "ART", "SUM")[0]
    assert theirs.user.startswith("coherence do its") and theirs.user.endswith("ART SUM")


@pytest.mark.parametrize("name", [value["name"] for value in ENTRIES[:6]])
def test_a_missing_prompt_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "p.jsonl", [value for value in ENTRIES if value["name"] != name])
    with pytest.raises(ConfigError, match=f"no prompt '{name}'"):
        load_judge_prompts(path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompt_template": "{question}"}, "'single-v1'.*'answer'"),
        ({"prompt_template": "{question} {answer} {score}"}, "'single-v1'.*'score'"),
        ({"prompt_template": "{question} {answer!r}"}, "'single-v1'.*'answer'"),
        ({"prompt_template": "{question} {answer} {"}, "'single-v1' cannot be read"),
        ({"prompt_template": None}, "'single-v1' has no text in 'prompt_template'"),
        ({"type": "pairwise"}, "type 'pairwise'; expected 'single'"),
        ({"output_format": "[rating]"}, r"output_format '\[rating\]'; expected '\[\[rating\]\]'"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = write(tmp_path / "p.jsonl", [{**ENTRIES[0], **change}, *ENTRIES[1:]])
    with pytest.raises(ConfigError, match=":1: .*" + says):
        load_judge_prompts(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"{", ":1: not JSON"), (b"[]", "with 'name'"), (b"\xff", "not UTF-8"), (b"", "no prompt")],
)
def test_a_file_that_holds_no_prompts_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=says) as caught:
        load_judge_prompts(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"no-such\.jsonl cannot be read"):
        load_judge_prompts(tmp_path / "no-such.jsonl")
