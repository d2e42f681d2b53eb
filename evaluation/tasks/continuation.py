"""Continue prompts cut from text: how long does a method write what the full model writes?"""

from __future__ import annotations

from skipcal.configs.sweep import ContinuationSettings
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.perplexity import text_rows
from skipcal.evaluation.tasks.task import AnsweredTask


class Continuation(AnsweredTask[list[int]]):
    """Prompts as token ids, continued greedily as plain text."""

    name = "continuation"

    def prompt(self, item: list[int], subject: Subject) -> list[int]:
        """The item itself."""
        return item

    def subset(self, key: str) -> str | None:
        """The corpus."""
        return key.rpartition("/")[0]


def load_continuation(settings: ContinuationSettings, subject: Subject, seed: int) -> Continuation:
    """Cut the prompts.

    Raises Unavailable where text is missing or too short, ConfigError for prompts that do not fit the model.
    """
    prompts, sources = text_rows(settings, subject, settings.prompts, settings.prompt_tokens, seed)
    task = Continuation(
        items=prompts,
        new_tokens=settings.new_tokens,
        warm_up_tokens=settings.warm_up,
        source={"corpora": sources, "prompt_tokens": settings.prompt_tokens, "seed": seed},
    )
    task.check_prompts(subject)
    return task
