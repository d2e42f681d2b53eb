"""CNN/DailyMail: summaries of articles in three buckets of length (See et al., arXiv 1704.04368)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from skipcal.configs.sweep import SummarySettings
from skipcal.errors import Unavailable
from skipcal.evaluation.tasks.answers import Answer, Subject
from skipcal.evaluation.tasks.task import AnsweredTask, Metrics, Record, in_subsets, text_quality
from skipcal.evaluation.tasks.text_metrics import check_rouge, copy_rate, rouge
from skipcal.text.corpora import file_sha256
from skipcal.text.question_sets import hub_commit, hub_records, read_records, text_field, unique

HUB, HUB_CONFIG, HUB_SPLIT = "abisee/cnn_dailymail", "3.0.0", "test"
PROMPT = "Summarize the article in two or three sentences.\n\nArticle: {article}\n\nSummary:"
# Whitespace words of the article: the paper's bounds, which overlap at 470 and 790.
BUCKETS = {"small": range(471), "medium": range(471, 790), "large": range(790, 1_000_000)}


@dataclass(frozen=True)
class Story:
    """An article with its reference summary."""

    article: str
    highlights: str

    @property
    def bucket(self) -> str:
        """Its bucket of length."""
        words = len(self.article.split())
        return next(name for name, lengths in BUCKETS.items() if words in lengths)


class Summarization(AnsweredTask[Story]):
    """Articles by id."""

    name = "summarization"
    asked: ClassVar[Mapping[str, str]] = {"prompt": PROMPT}

    def prompt(self, item: Story, subject: Subject) -> list[int]:
        """The article, and what to do with it."""
        return subject.encode([{"role": "user", "content": PROMPT.replace("{article}", item.article)}])

    def subset(self, key: str) -> str | None:
        """The bucket."""
        return self.items[key].bucket

    def record(self, answer: Answer) -> Record:
        """The summary with its scores."""
        story = self.items[answer.id]
        scores = {**rouge(answer.text, story.highlights), "copy_rate": copy_rate(answer.text, story.article)}
        return {**super().record(answer), **scores}

    def metrics(self, record: Record, full: Record) -> Metrics:
        """ROUGE F1, and how much is copied: judges like copied text, so it belongs beside every score."""
        own = {name: record[name] for name in ("rouge1", "rouge2", "rougeL", "copy_rate")}
        return in_subsets({**own, **text_quality(record, full)}, self.subset(record["id"]))


def load_summarization(settings: SummarySettings, subject: Subject, seed: int) -> Summarization:
    """Read the articles and draw `items` of each bucket.

    Raises Unavailable if there are not so many, ConfigError for articles that do not fit the model and
    without the package that scores summaries.
    """
    check_rouge()
    if settings.data_file is None:
        where, commit = HUB, hub_commit(HUB)
        rows: Iterable[tuple[str, dict[str, Any]]] = (
            (HUB, record) for record in hub_records(HUB, HUB_CONFIG, HUB_SPLIT, commit)
        )
        source = {"file": HUB, "config": HUB_CONFIG, "split": HUB_SPLIT, "revision": commit}
    else:
        where = settings.data_file
        rows = read_records(Path(where))
        source = {"file": Path(where).name, "sha256": file_sha256(Path(where))}
    stories: dict[str, Story] = {}
    for place, record in rows:
        key = unique(stories, str(record.get("id", place)), place)
        stories[key] = Story(text_field(record, "article", place), text_field(record, "highlights", place))
    chosen: set[str] = set()
    for bucket in BUCKETS:
        keys = sorted(key for key, story in stories.items() if story.bucket == bucket)
        if len(keys) < settings.items:
            raise Unavailable(
                f"{where} has {len(keys)} articles in bucket {bucket!r}, {settings.items} are wanted; lower "
                "the number of items"
            )
        chosen |= set(random.Random(seed).sample(keys, settings.items))
    stories = {key: story for key, story in stories.items() if key in chosen}
    task = Summarization(
        items=stories,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={**source, "items": settings.items, "seed": seed},
    )
    task.check_prompts(subject)
    return task
