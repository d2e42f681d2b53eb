"""One arm of a comparison: a method at a target skip ratio on one task, item by item on disk."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.errors import ConfigError
from skipcal.evaluation.records import RecordFile, digest
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.task import Record, Task
from skipcal.runtime.session import idle_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arm:
    """What is run: a method and the ratio it is asked for; None for the full model."""

    method: str
    target_skip_ratio: float | None

    @property
    def label(self) -> str:
        """As in file names: `random-0.25`, `full`."""
        return self.method if self.target_skip_ratio is None else f"{self.method}-{self.target_skip_ratio:g}"


@dataclass(frozen=True)
class ArmResult:
    """Records of all items by id; `idle` is the report of the policy before anything ran."""

    arm: Arm
    policy: Policy
    records: dict[str, Record]
    idle: SkipReport

    def report(self, ids: Iterable[str] | None = None) -> SkipReport:
        """The counts over some items, by default all. Batches do not mix subsets, so theirs are exact."""
        records = self.records.values() if ids is None else [self.records[key] for key in ids]
        return SkipReport.from_shares(self.idle, [(r["report"], r["batch"]) for r in records])


def run_arm(
    subject: Subject,
    task: Task,
    arm: Arm,
    policy: Policy,
    *,
    about: dict[str, Any],
    folder: Path,
    batch_size: int,
) -> ArmResult:
    """Run what is not on disk yet, and read the rest.

    about: what decides the records besides task and policy: the model and how it is loaded. With it
    the file's name carries a digest, so that records of different settings never meet in one file.
    """
    header = {
        "task": task.name,
        "method": arm.method,
        "policy": policy.to_dict(),
        "data": task.header(),
        **about,
    }
    file = RecordFile(folder / task.name / f"{arm.label}-{digest(header)}.jsonl", header)
    missing = [key for key in task.ids if key not in file.done]
    with tqdm(
        total=len(task.ids),
        initial=len(file.done),
        desc=f"{task.name} {arm.label}",
        unit="item",
        disable=None,
    ) as bar:
        for ids in _by_subset(task, missing):
            for records, report in task.run(subject, policy, ids, batch_size):
                counts = report.counts()
                file.append(*({**record, "batch": len(records), "report": counts} for record in records))
                bar.update(len(records))
    ordered = {key: file.done[key] for key in task.ids}
    result = ArmResult(arm, policy, ordered, idle_report(subject.architecture, policy))
    if policy.method != "full" and result.report().skipped_blocks == 0:
        logger.warning("%s on %s skipped nothing: its numbers are the full model's", arm.label, task.name)
    return result


def _by_subset(task: Task, ids: Sequence[str]) -> Iterator[list[str]]:
    subsets = {key: task.subset(key) for key in ids}
    for subset in dict.fromkeys(subsets.values()):
        yield [key for key in ids if subsets[key] == subset]


def measured_ratio(
    subject: Subject, task: Task, policy: Policy, ids: Sequence[str], batch_size: int
) -> float:
    """Skip ratio of a policy over some items of a task, without keeping anything.

    Raises ConfigError when no token came after the warm-up.
    """
    ratio = SkipReport.merged(list(task.reports(subject, policy, ids, batch_size))).skip_ratio
    if math.isnan(ratio):
        raise ConfigError(
            f"{task.name}: every answer ended within the warm-up of {policy.warm_up_tokens} tokens, so no "
            "ratio can be matched; lower --warm-up-tokens"
        )
    return ratio
