"""Answers of a model under a policy: batched, sorted by length, greedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

from skipcal.arch.limits import check_ids, check_length
from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import Architecture
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.evaluation.full_passes import FullPasses
from skipcal.evaluation.hosts import Host, host_for
from skipcal.text.batching import batches
from skipcal.text.chat_template import WITHOUT, templated
from skipcal.text.opening import row_ids

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """New tokens, up to and with the end of sequence, and their text."""

    id: str
    tokens: list[int]
    text: str


@dataclass(frozen=True)
class Subject:
    """A loaded model with its located blocks: what is evaluated.

    engine:      of what is generated.
    full_passes: what the full model predicts over text; kept only where a run asks for it.
    """

    loaded: LoadedModel
    architecture: Architecture
    chat_template: bool
    engine: str = "auto"
    full_passes: FullPasses = field(default_factory=FullPasses, repr=False, compare=False)

    @cached_property
    def host(self) -> Host:
        """Whoever decodes answers. Raises as `host_for` does."""
        return host_for(self.loaded, self.architecture, self.engine)

    def groups(self, items: Sequence[T], batch_size: int) -> Iterator[list[T]]:
        """The items that are handed to the host together, each time."""
        return batches(items, max(1, len(items)) if self.host.takes_all else batch_size)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation that the model is to go on with.

        Without a chat template the contents stand one after the other, as plain text that goes on.
        """
        tokenizer: Any = self.loaded.tokenizer
        if not self.chat_template:
            text = "\n\n".join(message["content"] for message in messages)
            return row_ids(tokenizer, text)
        ids = templated(
            tokenizer, messages, instead=WITHOUT, add_generation_prompt=True, return_dict=True, tokenize=True
        )["input_ids"]
        return list(ids)


def answers(
    subject: Subject,
    policy: Policy,
    prompts: dict[str, list[int]],
    *,
    new_tokens: int,
    batch_size: int,
) -> Iterator[tuple[list[Answer], SkipReport]]:
    """Answer every prompt (token ids, by item id), group by group, the longest first.

    One session runs all of them, so between two groups the model is not to be used for anything else.
    Raises ConfigError for a prompt that leaves no room for `new_tokens` in the model's context.
    """
    check_prompts(subject, prompts, new_tokens)
    # Rows of like length waste little padding; the longest first, so that memory runs out at once or never.
    ordered = sorted(prompts, key=lambda key: (-len(prompts[key]), key))
    decode: Any = subject.loaded.tokenizer.decode
    with subject.host.decoding(policy, batch_size) as run:
        for keys in subject.groups(ordered, batch_size):
            rows, report = run([prompts[key] for key in keys], new_tokens)
            yield (
                [
                    Answer(key, row, decode(row, skip_special_tokens=True))
                    for key, row in zip(keys, rows, strict=True)
                ],
                report,
            )


def check_prompts(subject: Subject, prompts: dict[str, list[int]], new_tokens: int) -> None:
    """Raise ConfigError for prompts (token ids, by item id) that the model cannot be given.

    So is one that leaves no room for `new_tokens` in the model's context.
    """
    model = subject.loaded.model
    for key, prompt in prompts.items():
        what = f"item {key!r} has {len(prompt)} tokens, and {new_tokens} more do"
        check_length(model, len(prompt) + new_tokens, what, lower="--new-tokens or leave the item out")
    check_ids(model, prompts.values())
    subject.host.reserve(max((len(prompt) for prompt in prompts.values()), default=0) + new_tokens)
