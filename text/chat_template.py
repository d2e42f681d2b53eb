"""Wrap a conversation as the tokenizer's chat template has it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipcal.errors import ConfigError, first_words

WITHOUT = "leave the template out with --no-chat-template"


def templated(tokenizer: Any, messages: Sequence[dict[str, str]], *, instead: str, **options: Any) -> Any:
    """What `tokenizer.apply_chat_template` gives. instead: what to type where there is no way with it.

    Raises ConfigError where the template refuses the conversation, or cannot be run.
    """
    try:
        return tokenizer.apply_chat_template(list(messages), **options)
    except Exception as error:  # a template raises what it wants, and what is wrong inside it
        raise refusal(error, instead) from error


def refusal(error: Exception, instead: str) -> ConfigError:
    """What to say of a template that raised."""
    return ConfigError(
        f"the tokenizer's chat template refuses the conversation ({first_words(error)}); {instead}"
    )
