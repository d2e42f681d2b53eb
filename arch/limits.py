"""What a model can be given: rows within its context, token ids of its vocabulary, inputs of its forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from skipcal.arch.blocks import context_tokens, parallel_limit
from skipcal.errors import ConfigError, Unavailable


def check_length(model: Any, tokens: int, what: str, *, lower: str) -> None:
    """Raise ConfigError for a row longer than the model's context, where its configuration has one.

    what:  whose tokens they are, with a verb: "windows of 512 tokens do".
    lower: the options that make it shorter.
    """
    context = context_tokens(model.config)
    if context and tokens > context:
        raise ConfigError(f"{what} not fit the model's context of {context}; lower {lower}")


def check_angles(model: Any, tokens: int, prompt_tokens: int, *, lower: str) -> None:
    """Raise ConfigError for a row to which one pass gives other rotary angles than decoding does."""
    longest = parallel_limit(model.config, prompt_tokens)
    if longest is not None and tokens > longest:
        raise ConfigError(
            f"a row of {tokens} tokens is decoded with other rotary angles than one pass gives it, for the "
            f"model changes them past {longest}; lower {lower}"
        )


def check_ids(model: Any, rows: Iterable[Sequence[int]]) -> None:
    """Raise ConfigError for a token that the model has no embedding of."""
    size = model.config.get_text_config().vocab_size
    stray = next((token for row in rows for token in row if not 0 <= token < size), None)
    if stray is not None:
        raise ConfigError(
            f"token {stray} is not within the model's vocabulary of {size}; give the tokenizer that belongs "
            "to the model"
        )


def check_tokenizer(model: Any, tokenizer: Any, name: str) -> None:
    """Raise Unavailable where text could hold tokens that the model has no embedding of.

    Some models have a tokenizer with a few special tokens more than they know, which no text yields.
    """
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) <= size:
        return
    special = tokenizer.added_tokens_decoder
    if any(token >= size for token in tokenizer.get_vocab().values() if token not in special):
        raise Unavailable(
            f"model {name!r} has embeddings of {size} tokens and a tokenizer of {len(tokenizer)}; give a "
            "folder or hub id whose tokenizer belongs to the model"
        )


def fitted_tokenizer(model: Any, tokenizer: Any) -> Any:
    """The tokenizer, or a copy of it that makes no inputs which the model's forward does not take."""
    taken = inspect.signature(type(model).forward).parameters
    names = list(getattr(tokenizer, "model_input_names", ()))
    kept = [name for name in names if name in taken]
    if kept == names or "input_ids" not in kept:  # a forward may take all by **kwargs
        return tokenizer
    fitted = copy.copy(tokenizer)
    fitted.model_input_names = kept
    return fitted
