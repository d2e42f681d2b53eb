"""A text column is for text that has columns."""

from __future__ import annotations

import pytest

from skipcal.errors import ConfigError
from skipcal.text.known import resolve_corpora


@pytest.mark.parametrize(
    ("names", "files"),
    [([], ["a.txt"]), (["embedded"], []), (["gsm8k"], []), ([], ["svamp:single=a.jsonl"]), ([], [])],
)
def test_a_text_column_without_effect_is_refused(names: list[str], files: list[str]) -> None:
    with pytest.raises(ConfigError, match="--text-column 'body' has no effect on"):
        resolve_corpora(names, files, text_column="body")
    assert all(corpus.text_column == "text" for corpus in resolve_corpora(names, files))


@pytest.mark.parametrize(
    ("names", "files"), [([], ["a.txt", "b.jsonl"]), (["embedded", "c4"], []), (["org/set"], [])]
)
def test_a_text_column_of_one_of_the_texts_is_taken(names: list[str], files: list[str]) -> None:
    assert resolve_corpora(names, files, text_column="body")[-1].text_column == "body"
