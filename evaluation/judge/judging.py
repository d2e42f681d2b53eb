"""Ratings of an arm's records by a judge, as metrics."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from skipcal.configs.sweep import JudgeOptions
from skipcal.evaluation.arms import ArmResult
from skipcal.evaluation.judge.judge import ask
from skipcal.evaluation.judge.prompts import (
    JudgePrompt,
    load_judge_prompts,
    pair_outcome,
    pair_requests,
    rating_requests_mtbench,
    rating_requests_summary,
)
from skipcal.evaluation.judge.settings import JudgeSettings
from skipcal.evaluation.judge.verdicts import JudgeRequest, Verdict
from skipcal.evaluation.records import digest
from skipcal.evaluation.statistics import Share
from skipcal.evaluation.tasks.mtbench import MTBench
from skipcal.evaluation.tasks.summarization import Summarization
from skipcal.evaluation.tasks.task import ALL, Metrics, Record, Task, in_subsets

logger = logging.getLogger(__name__)

_WON = {"first": 1.0, "tie": 0.5, "second": 0.0}


class Judging:
    """Asks one judge about arms of tasks that it can rate: summarization and mtbench."""

    def __init__(self, options: JudgeOptions, folder: Path) -> None:
        """Raise ConfigError or Unavailable for options and prompts that cannot be used."""
        settings = options.model_dump(exclude={"prompts", "pairwise"})
        self._settings = JudgeSettings(**settings)
        self._prompts: Mapping[str, JudgePrompt] | None = (
            load_judge_prompts(Path(options.prompts)) if options.prompts else None
        )
        self._pairwise = options.pairwise
        self._folder = folder

    def metrics(self, task: Task, result: ArmResult, full: ArmResult) -> dict[str, Metrics]:
        """Ratings by item id, asked for where they are not on disk. Nothing for other tasks.

        An item whose verdict could not be read has no share in that metric: it is neither 0 nor a
        tie, and its absence shows in `n`.
        """
        if isinstance(task, MTBench):
            requests = {k: self._mtbench(task, k, r) for k, r in result.records.items()}
        elif isinstance(task, Summarization):
            requests = {
                k: rating_requests_summary(k, task.items[k].article, r["text"], self._prompts)
                for k, r in result.records.items()
            }
        else:
            return {}
        pairs = self._pairs(task, result, full)
        asked = [
            *(r for each in requests.values() for r in each),
            *(r for each in pairs.values() for r in each),
        ]
        verdicts = ask(asked, self._settings, self._file(task, result, asked))
        unread = sum(v.rating is None and v.winner is None for v in verdicts.values())
        if unread:
            logger.warning("%s %s: %d verdicts could not be read", task.name, result.arm.label, unread)
        shares = {key: self._ratings(task, key, each, verdicts) for key, each in requests.items()}
        for key, (ab, ba) in pairs.items():
            outcome = pair_outcome(verdicts[ab.id], verdicts[ba.id])
            if outcome is not None:
                shares[key][(ALL, "judge_win_rate")] = Share(_WON[outcome])
        return shares

    def _mtbench(self, task: MTBench, key: str, record: Record) -> list[JudgeRequest]:
        question = task.items[key]
        references = list(question.references) if question.references else None
        return rating_requests_mtbench(
            key, question.category, list(question.turns), record["answers"], references, self._prompts
        )

    def _pairs(self, task: Task, result: ArmResult, full: ArmResult) -> dict[str, list[JudgeRequest]]:
        """Each answer against the full model's, in both orders: MT-Bench's first turns."""
        if not self._pairwise or not isinstance(task, MTBench) or result is full:
            return {}
        found = {}
        for key, record in result.records.items():
            question = task.items[key]
            found[key] = pair_requests(
                key,
                question.turns[0],
                record["answers"][0],
                full.records[key]["answers"][0],
                reference=question.references[0] if question.references else None,
                prompts=self._prompts,
            )
        return found

    @staticmethod
    def _ratings(task: Task, key: str, requests: list[JudgeRequest], verdicts: dict[str, Verdict]) -> Metrics:
        rated = {request.id.rpartition("/")[2]: verdicts[request.id].rating for request in requests}
        known = {name: rating for name, rating in rated.items() if rating is not None}
        values = {f"judge_{name}": rating for name, rating in known.items()}
        if len(known) == len(rated):  # a mean over fewer would favour items whose bad half is missing
            values["judge_rating"] = sum(known.values()) / len(known)
        return in_subsets(values, task.subset(key))

    def _file(self, task: Task, result: ArmResult, asked: list[JudgeRequest]) -> Path:
        """One file for each judge and each set of answers."""
        about: list[Any] = [vars(self._settings), [(r.id, r.prompt_sha256) for r in asked]]
        return self._folder / task.name / f"{result.arm.label}-{digest(about)}.jsonl"
