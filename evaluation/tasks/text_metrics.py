"""Metrics of one generated text, without a judge."""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeVar

from skipcal.errors import ConfigError

REPEATED_NGRAM = 4
COLLAPSED = 0.5  # share of repeated 4-grams from which a text counts as collapsed
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, " "))

T = TypeVar("T")


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, single spaces (after SQuAD, arXiv 1606.05250)."""
    return " ".join(_ARTICLES.sub(" ", " ".join(_words(text))).split())


def exact_match(answer: str, aliases: Sequence[str]) -> bool:
    """The first line of the answer is one of the aliases, both normalized."""
    lines = [line for line in answer.splitlines() if line.strip()]
    said = normalized(lines[0]) if lines else ""
    return said != "" and said in {normalized(alias) for alias in aliases}


def contains_answer(answer: str, aliases: Sequence[str]) -> bool:
    """One of the aliases stands in the answer, as whole words."""
    said = f" {normalized(answer)} "
    return any(f" {normalized(alias)} " in said for alias in aliases if normalized(alias))


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that stood before: 1 - distinct / all (seq-rep-4, arXiv 1908.04319).

    0 for a text too short to have two.
    """
    grams = [tuple(tokens[i : i + REPEATED_NGRAM]) for i in range(len(tokens) - REPEATED_NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0


def common_prefix(a: Sequence[T], b: Sequence[T]) -> int:
    """Number of leading elements that are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def agreement(a: Sequence[T], b: Sequence[T]) -> float:
    """Share of positions with equal elements; a position that only one of them has counts as unlike."""
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


def copy_rate(summary: str, source: str) -> float:
    """Length of the longest run of words taken from the source, as a share of the summary's words."""
    words, given = _words(summary), _words(source)
    best = 0
    row = [0] * (len(given) + 1)
    for word in words:
        previous, row = row, [0] * (len(given) + 1)
        for j, other in enumerate(given):
            if word == other:
                row[j + 1] = previous[j] + 1
        best = max(best, *row)
    return best / len(words) if words else 0.0


def _words(text: str) -> list[str]:
    """Words in lower case, without punctuation."""
    return unicodedata.normalize("NFKC", text).casefold().translate(_PUNCTUATION).split()


def check_rouge() -> None:
    """Raise ConfigError where `rouge` cannot be computed, before there is anything to score."""
    _rouge_scorer()


def rouge(summary: str, reference: str) -> dict[str, float]:
    """ROUGE-1, -2 and -L F1 with stemming, by the package rouge-score."""
    found = _rouge_scorer().score(reference, summary)
    return {name: float(score.fmeasure) for name, score in found.items()}


@functools.cache
def _rouge_scorer() -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ConfigError(
            'ROUGE needs the package rouge-score; install it with: pip install "skipcal[eval]"'
        ) from error
    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
