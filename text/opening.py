"""How text becomes a row of tokens: one rule, for whatever is calibrated on, measured or gone on with.

A row begins as the tokenizer begins a text: with the special tokens that it puts before one, for many a
beginning-of-sequence token. These are the row's opening, and count to its length. A window from the middle
of a text has it too: to the model each row is a text of its own, and many have never seen one without.
Nothing follows: an end-of-sequence token that the tokenizer puts after a text would say that it is over,
which is true neither of a window nor of a prompt. A text that begins with the opening, as a rendered chat
template may, gets no second one. The rest are tokens of the text as a whole: where it is cut, no space is
put in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipcal.errors import ConfigError

_PROBE = "12"  # any short text does: what is put around it is put around all


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before a text.

    Raises ConfigError for a tokenizer that changes the text when it adds them.
    """
    bare = text_ids(tokenizer, _PROBE)
    whole = list(tokenizer(_PROBE)["input_ids"])
    for count in range(len(whole) - len(bare), -1, -1):
        if bare and whole[count : count + len(bare)] == bare:
            return whole[:count]
    raise ConfigError(
        f"the tokenizer makes {bare} of {_PROBE!r} without special tokens and {whole} with them; expected "
        "these before and after the text only, so give a tokenizer that leaves the text as it is"
    )


def opening_names(tokenizer: Any) -> list[str]:
    """The opening as texts, for people: `["<s>"]`, say."""
    ids = opening(tokenizer)
    return list(tokenizer.convert_ids_to_tokens(ids)) if ids else []


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text and nothing else."""
    # verbose=False: a stream is longer than the model's context, and is never given to it whole.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def row_ids(tokenizer: Any, text: str) -> list[int]:
    """A whole text as a row."""
    return _opened(text_ids(tokenizer, text), opening(tokenizer))


def window(ids: Sequence[int], start: int, length: int, opening: Sequence[int]) -> list[int]:
    """The row of `length` tokens that begins at `start` of a text's tokens; shorter where they end."""
    return _opened(ids[start : start + length], opening)[:length]


def prefill_tokens(tokenizer: Any) -> int:
    """How many tokens of a row of known text are given, not decoded: its opening, at least the first."""
    return max(1, len(opening(tokenizer)))


def _opened(ids: Sequence[int], opening: Sequence[int]) -> list[int]:
    begun = list(ids[: len(opening)]) == list(opening)
    return list(ids) if begun else [*opening, *ids]
