"""What a task is, and the table of tasks.

A task turns items into records, batch by batch, under whatever policy a session runs; and a record
into shares of metrics. Everything else (files, resuming, intervals, pairing) is the same for all tasks.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.errors import Unavailable
from skipcal.evaluation.statistics import Scale, Share
from skipcal.evaluation.tasks.answers import Answer, Subject, answers, check_prompts
from skipcal.evaluation.tasks.text_metrics import COLLAPSED, agreement, common_prefix, repetition

Record = dict[str, Any]
Item = TypeVar("Item")
ALL = "all"  # the subset of all items

Metrics = dict[tuple[str, str], Share]  # by subset and metric


class Task(Protocol):
    """One kind of evaluation over items that are loaded already."""

    @property
    def name(self) -> str:
        """Its name in tables and options."""

    @property
    def new_tokens(self) -> int:
        """The most tokens of a row that come after its prompt."""

    @property
    def warm_up_tokens(self) -> int:
        """Decode steps of each row by the full model."""

    @property
    def scales(self) -> Mapping[str, Scale]:
        """Scales of the metrics that are no plain mean."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all items."""

    def subset(self, key: str) -> str | None:
        """The subset an item belongs to, besides all of them; it is run in batches of its own."""

    def header(self) -> dict[str, Any]:
        """All that decides the records besides model and policy: data with sha256, settings."""

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """Records of the items with these ids, batch by batch, each with the report of its batch."""

    def reports(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[SkipReport]:
        """The reports of `run` over the same items, with nothing scored."""

    def metrics(self, record: Record, full: Record) -> Metrics:
        """What a record contributes; `full` is the full model's record of the same item."""


@dataclass(frozen=True)
class AnsweredTask(ABC, Generic[Item]):
    """A task whose items are prompts, each answered once by decoding.

    items: by id. source: where they come from, as the header tells it.
    """

    items: dict[str, Item]
    new_tokens: int
    warm_up_tokens: int
    source: dict[str, Any]
    name: ClassVar[str]
    asked: ClassVar[Mapping[str, str]] = {}  # words of the prompt that are the same for all items

    @abstractmethod
    def prompt(self, item: Item, subject: Subject) -> list[int]:
        """The token ids that the model goes on from."""

    @property
    def scales(self) -> Mapping[str, Scale]:
        """All metrics are means."""
        return {}

    @property
    def ids(self) -> Sequence[str]:
        """Of all items."""
        return list(self.items)

    def subset(self, key: str) -> str | None:
        """There are none."""
        return None

    def header(self) -> dict[str, Any]:
        """Where the items come from, the prompt and the length."""
        return {**self.source, **self.asked, "new_tokens": self.new_tokens}

    def check_prompts(self, subject: Subject) -> None:
        """Raise ConfigError for items that do not fit the model, before any work."""
        prompts = {key: self.prompt(item, subject) for key, item in self.items.items()}
        check_prompts(subject, prompts, self.new_tokens)

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """One record an item."""
        prompts = {key: self.prompt(self.items[key], subject) for key in ids}
        for group, report in answers(
            subject, policy, prompts, new_tokens=self.new_tokens, batch_size=batch_size
        ):
            yield [self.record(answer) for answer in group], report

    def reports(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[SkipReport]:
        """To score an answer is little beside decoding it."""
        return (report for _, report in self.run(subject, policy, ids, batch_size))

    def record(self, answer: Answer) -> Record:
        """The record of one answer."""
        return {"id": answer.id, "tokens": answer.tokens, "text": answer.text}

    def metrics(self, record: Record, full: Record) -> Metrics:
        """Repetition, and likeness to the full model's text."""
        return in_subsets(text_quality(record, full), self.subset(record["id"]))


def text_quality(record: Record, full: Record) -> dict[str, float]:
    """Metrics of any generated text: collapse, and likeness to what the full model writes."""
    mine, theirs = record["tokens"], full["tokens"]
    repeated = repetition(mine)
    return {
        "repetition": repeated,
        "collapse_rate": float(repeated > COLLAPSED),
        "token_agreement": agreement(mine, theirs),
        "common_prefix_tokens": float(common_prefix(mine, theirs)),
    }


def in_subsets(values: Mapping[str, float], subset: str | None = None) -> Metrics:
    """The same values for all items together and for the subset the item belongs to."""
    places = (ALL,) if subset is None else (ALL, subset)
    return {(place, name): Share(value) for place in places for name, value in values.items()}


def drawn(items: dict[str, Item], count: int | None, seed: int, what: str) -> dict[str, Item]:
    """`count` items drawn by seed, in their own order; all of them for None."""
    if count is None:
        return items
    if count > len(items):
        raise Unavailable(f"{what} has {len(items)} items, {count} are wanted; lower the number of items")
    chosen = set(random.Random(seed).sample(sorted(items), count))
    return {key: item for key, item in items.items() if key in chosen}
