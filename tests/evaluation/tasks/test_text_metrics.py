"""Metrics of single texts, by hand."""

from __future__ import annotations

import pytest

from skipcal.evaluation.tasks.text_metrics import (
    agreement,
    common_prefix,
    contains_answer,
    copy_rate,
    exact_match,
    normalized,
    repetition,
    rouge,
)


def test_normalized() -> None:
    assert normalized(" The  Beatles' (Album)! ") == "beatles album"
    assert normalized("\N{FULLWIDTH LATIN CAPITAL LETTER F}oo-bar") == "foo bar"
    assert normalized("a an the") == ""


@pytest.mark.parametrize(
    ("answer", "right", "contained"),
    [
        ("Dwight D. Eisenhower", True, True),
        ("the dwight d eisenhower.\nHe won it.", True, True),
        ("It was Dwight D. Eisenhower.", False, True),
        ("\n\nIke", True, True),
        ("Eisenhower", False, False),
        ("Ikea", False, False),
        ("", False, False),
        ("\n", False, False),
    ],
)
def test_matches_over_aliases(answer: str, right: bool, contained: bool) -> None:
    aliases = ["dwight d. eisenhower", "Ike"]
    assert exact_match(answer, aliases) is right
    assert contains_answer(answer, aliases) is contained


def test_an_alias_of_articles_alone_is_in_no_answer() -> None:
    assert not contains_answer("whatever", ["The"])
    assert not exact_match("the", ["The The"])
    assert not exact_match("...", ["A"])


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], 0.0),
        ([1, 2, 3, 4], 0.0),
        ([1, 2, 3, 4, 5, 6, 7, 8], 0.0),
        ([7] * 10, 6 / 7),  # 7 four-grams, one distinct
        ([1, 2] * 5, 5 / 7),
    ],
)
def test_repetition(tokens: list[int], expected: float) -> None:
    assert repetition(tokens) == pytest.approx(expected)


def test_likeness_to_the_full_model() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([], [1]) == 0
    assert agreement([1, 2, 3], [1, 9, 3]) == pytest.approx(2 / 3)
    assert agreement([1, 2], [1, 2, 3, 4]) == 0.5
    assert agreement([], []) == 1.0


def test_copy_rate_is_the_longest_common_run_of_words() -> None:
    source = "The old harbour was built by monks, and monks kept it."
    assert copy_rate("Monks kept it; the old harbour was built by them.", source) == pytest.approx(6 / 10)
    assert copy_rate("Nothing alike", source) == 0.0
    assert copy_rate("", source) == 0.0


def naive_copy_rate(summary: list[str], source: list[str]) -> float:
    runs = {tuple(source[i:j]) for i in range(len(source)) for j in range(i + 1, len(source) + 1)}
    longest = max(
        (j - i for i in range(len(summary)) for j in range(i + 1, len(summary) + 1)
         if tuple(summary[i:j]) in runs),
        default=0,
    )  # fmt: skip
    return longest / len(summary)


@pytest.mark.parametrize("seed", range(5))
def test_copy_rate_against_all_runs(seed: int) -> None:
    import random

    draw = random.Random(seed)
    summary = [f"w{draw.randrange(4)}" for _ in range(9)]
    source = [f"w{draw.randrange(4)}" for _ in range(14)]
    assert copy_rate(" ".join(summary), " ".join(source)) == pytest.approx(naive_copy_rate(summary, source))


def test_rouge_is_that_of_the_package() -> None:
    found = rouge("the cat sat", "the cat ran home")
    assert found["rouge1"] == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert found["rouge2"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (1 / 2 + 1 / 3))
    assert rouge("", "text")["rougeL"] == 0.0
