"""Continue prompts cut from text: how long does a method write what the full model writes?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipcal.configs.sweep import ContinuationSettings
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.evaluation.statistics import Scale
from skipcal.evaluation.tasks.answers import Subject, answers, check_prompts
from skipcal.evaluation.tasks.perplexity import text_rows
from skipcal.evaluation.tasks.task import Metrics, Record, answered, in_subsets, text_quality


@dataclass(frozen=True)
class Continuation:
    """Prompts as token ids, continued greedily as plain text."""

    prompts: dict[str, list[int]]
    new_tokens: int
    warm_up_tokens: int
    source: dict[str, Any]
    name: str = "continuation"

    @property
    def scales(self) -> Mapping[str, Scale]:
        """All metrics are means."""
        return {}

    @property
    def ids(self) -> Sequence[str]:
        """Corpus and number of each prompt."""
        return list(self.prompts)

    def subset(self, key: str) -> str | None:
        """The corpus."""
        return key.rpartition("/")[0]

    def header(self) -> dict[str, Any]:
        """Where the prompts come from."""
        return {**self.source, "new_tokens": self.new_tokens}

    def run(
        self, subject: Subject, policy: Policy, ids: Sequence[str], batch_size: int
    ) -> Iterator[tuple[list[Record], SkipReport]]:
        """One record a prompt."""
        prompts = {key: self.prompts[key] for key in ids}
        for group, report in answers(
            subject, policy, prompts, new_tokens=self.new_tokens, batch_size=batch_size
        ):
            yield [answered(answer) for answer in group], report

    def metrics(self, record: Record, full: Record) -> Metrics:
        """Likeness to the full model's text, and repetition."""
        return in_subsets(text_quality(record, full), self.subset(record["id"]))


def load_continuation(settings: ContinuationSettings, subject: Subject, seed: int) -> Continuation:
    """Cut the prompts.

    Raises Unavailable where text is missing or too short, ConfigError for prompts that do not fit the model.
    """
    prompts, sources = text_rows(settings, subject, settings.prompts, settings.prompt_tokens, seed)
    check_prompts(subject, prompts, settings.new_tokens)
    return Continuation(
        prompts=prompts,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={"corpora": sources, "prompt_tokens": settings.prompt_tokens, "seed": seed},
    )
