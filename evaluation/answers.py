"""Answers of a model under a policy: batched, sorted by length, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skipcal.arch.blocks import context_tokens
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture, input_device
from skipcal.errors import ConfigError
from skipcal.runtime.batching import batches, padded
from skipcal.runtime.greedy import greedy_decoding, until_stop
from skipcal.runtime.opening import row_ids
from skipcal.runtime.policy import Policy
from skipcal.runtime.report import SkipReport
from skipcal.runtime.session import skipping

Message = dict[str, str]


@dataclass(frozen=True)
class Answer:
    """New tokens, up to and with the end of sequence, and their text."""

    id: str
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Subject:
    """A loaded model with its located blocks: what is evaluated. engine: of what is generated."""

    loaded: LoadedModel
    architecture: Architecture
    chat_template: bool
    engine: str = "auto"

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to go on with.

        Without a chat template the contents stand one after the other, as plain text that goes on.
        """
        tokenizer: Any = self.loaded.tokenizer
        if not self.chat_template:
            text = "\n\n".join(message["content"] for message in messages)
            return row_ids(tokenizer, text)
        ids = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True, tokenize=True
        )["input_ids"]
        return list(ids)

    @property
    def context(self) -> int | None:
        """Longest row the model takes, where its configuration says so."""
        return context_tokens(self.loaded.model.config)


def answers(
    subject: Subject,
    policy: Policy,
    prompts: dict[str, list[int]],
    *,
    new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[list[Answer], SkipReport]]:
    """Answer every prompt (token ids, by item id), batch by batch, the longest first.

    One session runs all of them, so between two batches the model is not to be used for anything else.
    Raises ConfigError for a prompt that leaves no room for `new_tokens` in the model's context.
    """
    context = subject.context
    for key, prompt in prompts.items():
        if context and len(prompt) + new_tokens > context:
            raise ConfigError(
                f"item {key!r} has {len(prompt)} tokens, and {new_tokens} more do not fit the model's "
                f"context of {context}; lower --new-tokens or leave the item out"
            )
    # Rows of like length waste little padding; the longest first, so that memory runs out at once or never.
    ordered = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    decode: Any = subject.loaded.tokenizer.decode
    with skipping(
        subject.loaded.model, policy=policy, architecture=subject.architecture, engine=subject.engine
    ) as run:
        before = run.report
        for keys in batches(ordered, batch_size):
            rows = _generate(subject, [prompts[key] for key in keys], new_tokens)
            report = run.report
            yield (
                [
                    Answer(key, row, decode(row, skip_special_tokens=True))
                    for key, row in zip(keys, rows, strict=True)
                ],
                report.since(before),
            )
            before = report


def _generate(subject: Subject, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    model: Any = subject.loaded.model
    ids, mask = padded(prompts, input_device(model), side="left")
    with torch.no_grad(), greedy_decoding(model) as stops:
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens)
    return [until_stop(row, stops) for row in output[:, ids.shape[1] :].tolist()]
