"""A tiny model with a tokenizer whose special tokens are the model's."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from skipcal.arch.loading import LoadedModel


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w96; the tiny model's first three ids are special."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    names = [*special.values(), *(f"w{n}" for n in range(3, 97))]
    words = Tokenizer(WordLevel({name: n for n, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


@pytest.fixture
def loaded(tiny: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(model=tiny, tokenizer=tokenizer, name="tiny", revision=None)
