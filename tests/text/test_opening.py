"""How text becomes rows, for tokenizers that add special tokens before it, after it, or none."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from special_tokens import AROUND, around, ids_of, naive_rows

from skipcal.errors import ConfigError
from skipcal.text.opening import opening, opening_names, prefill_tokens, row_ids, text_ids, window

TEXT = st.text("abc 0", min_size=1, max_size=40).filter(str.strip)
SPACE = st.sampled_from(["never", "first", "always"])


@settings(deadline=None, max_examples=60)
@given(sides=st.sampled_from(AROUND), space=SPACE, text=TEXT)
def test_a_row_has_what_stands_before_a_text_and_nothing_after_it(
    sides: tuple[Any, Any], space: str, text: str
) -> None:
    before, after = sides
    tokenizer = around(before, after, space)
    whole = tokenizer(text)["input_ids"]
    assert opening(tokenizer) == ids_of(*before)
    assert opening_names(tokenizer) == list(before)
    assert prefill_tokens(tokenizer) == max(1, len(before))
    assert [*ids_of(*before), *text_ids(tokenizer, text), *ids_of(*after)] == whole
    assert row_ids(tokenizer, text) == whole[: len(whole) - len(after)]


@settings(deadline=None, max_examples=60)
@given(sides=st.sampled_from(AROUND), space=SPACE, text=TEXT, length=st.integers(3, 12))
def test_windows_are_the_opening_and_a_slice_of_the_text(
    sides: tuple[Any, Any], space: str, text: str, length: int
) -> None:
    before, after = sides
    tokenizer = around(before, after, space)
    ids, begun = text_ids(tokenizer, text), opening(tokenizer)
    room = length - len(begun)
    starts = range(0, len(ids) - room + 1, room)
    assert [window(ids, start, length, begun) for start in starts] == naive_rows(
        tokenizer, before, text, length
    )


@settings(deadline=None, max_examples=30)
@given(sides=st.sampled_from(AROUND), space=SPACE, text=TEXT)
def test_a_text_that_begins_with_the_opening_gets_no_second(
    sides: tuple[Any, Any], space: str, text: str
) -> None:
    before, after = sides
    tokenizer = around(before, after, space)
    rendered = "".join(before) + text
    row = row_ids(tokenizer, rendered)
    assert row == tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert row[: len(before)] == ids_of(*before)
    assert [row.count(token) for token in ids_of(*before)] == [1] * len(before)
    assert window(row, 0, 4, opening(tokenizer)) == row[:4]


def test_a_tokenizer_that_changes_the_text_is_refused() -> None:
    class Interleaved:
        def __call__(self, text: str, *, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
            ids = [ord(letter) for letter in text]
            return {"input_ids": [n for i in ids for n in (0, i)] if add_special_tokens else ids}

    with pytest.raises(ConfigError, match="expected these before and after the text only"):
        opening(Interleaved())
