"""Prompts as a chat model sees them in use: calibration text as a user's message in its template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from skipcal.errors import ConfigError
from skipcal.text.chat_template import templated
from skipcal.text.corpora import CorpusSample, sample_corpus
from skipcal.text.known import Corpus

_MESSAGE = "\N{OBJECT REPLACEMENT CHARACTER}skipcal\N{OBJECT REPLACEMENT CHARACTER}"


def sample_prompts(
    corpus: Corpus, tokenizer: Any, *, prompt_tokens: int, chat_template: bool, **settings: Any
) -> CorpusSample:
    """As `sample_corpus` does; with `chat_template` each prompt is a message to the model.

    A prompt has `prompt_tokens` tokens, those of the template included, and ends where the answer begins.
    Raises ConfigError where the tokenizer has no template, or the template leaves no room for text.
    """
    if not chat_template:
        return sample_corpus(corpus, tokenizer, prompt_tokens=prompt_tokens, **settings)
    before, after = chat_frame(tokenizer)
    room = prompt_tokens - len(before) - len(after)
    if room < 1:
        raise ConfigError(
            f"--prompt-tokens {prompt_tokens} leave no room for text beside the {prompt_tokens - room} of "
            "the chat template; raise --prompt-tokens"
        )
    sample = sample_corpus(corpus, _Text(tokenizer), prompt_tokens=room, **settings)
    return replace(
        sample,
        prompts=[[*before, *row, *after] for row in sample.prompts],
        held_out=[[*before, *row, *after] for row in sample.held_out],
    )


def chat_frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids before and after a user's message, up to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("the tokenizer has no chat template; leave out --chat-template")
    text = templated(
        tokenizer,
        [{"role": "user", "content": _MESSAGE}],
        instead="leave out --chat-template",
        add_generation_prompt=True,
        tokenize=False,
    )
    before, found, after = text.partition(_MESSAGE)
    if not found:
        raise ConfigError("the tokenizer's chat template changes a message; leave out --chat-template")
    plain = _Text(tokenizer)
    return plain(before)["input_ids"], plain(after)["input_ids"]


class _Text:
    """A tokenizer that adds no special tokens: the template has its own."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, text: str, **settings: Any) -> Any:
        return self._tokenizer(text, **{**settings, "add_special_tokens": False})
