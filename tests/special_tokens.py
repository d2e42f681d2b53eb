"""Tokenizers that put special tokens around a text, or none, each of characters."""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<sop>")
LETTERS = "▁abcdefghijklmnopqrstuvwxyz0123456789.:?QAu()"  # 48 with the special ones and "<unk>"

# What stands before a text, and what after it.
AROUND = [((), ()), (("<s>",), ()), ((), ("</s>",)), (("<s>",), ("</s>",)), (("<s>", "<sop>"), ("</s>",))]


@cache
def around(before: tuple[str, ...], after: tuple[str, ...], space: str = "never") -> Any:
    """A tokenizer that adds these. space: where it puts one before a text, as Metaspace names it."""
    vocabulary = {token: n for n, token in enumerate([*SPECIAL, "<unk>", *LETTERS])}
    letters = Tokenizer(BPE(vocabulary, [], unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=space, split=False)
    letters.decoder = decoders.Metaspace(prepend_scheme=space, split=False)
    if before or after:
        letters.post_processor = TemplateProcessing(
            single=" ".join([*before, "$A", *after]), special_tokens=[(s, vocabulary[s]) for s in SPECIAL]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<sop>"],
    )  # fmt: skip


def ids_of(*tokens: str) -> list[int]:
    return [SPECIAL.index(token) for token in tokens]


def naive_rows(tokenizer: Any, before: tuple[str, ...], text: str, length: int) -> list[list[int]]:
    """All rows of a text: what stands before one, then as much of the text as there is room for."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    room = length - len(before)
    return [ids_of(*before) + ids[n : n + room] for n in range(0, len(ids) - room + 1, room)]
