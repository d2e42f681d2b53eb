"""Methods x skip ratios x tasks: run every arm, and put all metrics into one tidy table."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from skipcal.arch.loading import LoadedModel, fingerprint
from skipcal.arch.locate import locate
from skipcal.configs.names import VLLM_ENGINE
from skipcal.configs.sweep import MATCHED, TASKS, SweepConfig
from skipcal.core.policy import Policy
from skipcal.errors import ConfigError
from skipcal.evaluation.arms import Arm, ArmResult, measured_ratio, run_arm
from skipcal.evaluation.hosts import check_policy
from skipcal.evaluation.judge.judging import Judging
from skipcal.evaluation.matching import match_threshold, threshold_scale, with_threshold
from skipcal.evaluation.records import RecordFile, digest
from skipcal.evaluation.statistics import Estimate, Share, difference, estimate
from skipcal.evaluation.tasks.answers import Subject
from skipcal.evaluation.tasks.continuation import load_continuation
from skipcal.evaluation.tasks.freebaseqa import load_freebaseqa
from skipcal.evaluation.tasks.mtbench import load_mtbench
from skipcal.evaluation.tasks.perplexity import load_perplexity
from skipcal.evaluation.tasks.summarization import load_summarization
from skipcal.evaluation.tasks.task import ALL, Metrics, Task
from skipcal.profiles.fits import warn_of_other_opening
from skipcal.profiles.methods import Ask, check_method, make_policy, recommended_ratio
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.greedy import warn_of_overruled
from skipcal.serving.offline import installed_version
from skipcal.text.opening import opening_names

logger = logging.getLogger(__name__)

_LOADERS: dict[str, Callable[[Any, Subject, int], Task]] = {
    "perplexity": load_perplexity,
    "continuation": load_continuation,
    "freebaseqa": load_freebaseqa,
    "summarization": load_summarization,
    "mtbench": load_mtbench,
}
TEACHER_FORCED = "perplexity"  # the task that decodes nothing: transformers runs it, whatever the engine
FULL = Arm("full", None)
COLUMNS = (
    "method", "task", "subset", "metric", "target_skip_ratio", "realised_skip_ratio", "value", "ci_low",
    "ci_high", "n", "difference", "difference_ci_low", "difference_ci_high", "skip_ratio_all",
    "skip_ratio_bytes", "unit", "warm_up_tokens", "threshold", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class SweepResult:
    """The tidy table, one row a method, ratio, task, subset and metric; and where records are."""

    frame: pd.DataFrame
    folder: Path


def run_sweep(
    loaded: LoadedModel,
    profile: SkipProfile,
    config: SweepConfig,
    folder: Path,
    *,
    begin: Callable[[], None] = lambda: None,
) -> SweepResult:
    """Run all arms whose records are not in `folder` yet, and put the table together.

    begin:      called when all items are read and fit the model, before anything is written.
    value:      over all items of the subset, with a 95 % bootstrap interval over items.
    difference: to the full model on the same items, with a paired interval.
    An interruption loses the batch that is running; the same call goes on from there.
    """
    profile.check_fits(loaded.model)
    warn_of_other_opening(profile, loaded.tokenizer)
    arms = plan(profile, config)
    config = config.settled(profile.policy.warm_up_tokens)
    templated = config.chat_template and _has_template(loaded)
    subject = Subject(loaded, locate(loaded.model), templated, config.engine)
    judging = Judging(config.judge, folder / "judge") if config.judge else None
    tasks = [
        _LOADERS[name](settings, subject, config.seed)
        for name in TASKS
        if (settings := getattr(config.tasks, name)) is not None
    ]
    if any(task.name != TEACHER_FORCED for task in tasks):
        warn_of_overruled(loaded.model)
    run = _Sweep(subject, profile, config, folder)
    begin()
    # All answers before all verdicts: a judge that fails must not keep a GPU waiting.
    done: list[tuple[Task, list[ArmResult]]] = []
    try:
        for each in tasks:
            with subject.full_passes.kept():  # of one task: the memory is the next one's
                done += [(task, run.arms(task, arms)) for task in _with_warm_ups(each, config.warm_ups)]
    finally:
        subject.host.close()
    rows: list[dict[str, Any]] = []
    for task, results in done:
        judged = {r.arm: judging.metrics(task, r, results[0]) for r in results} if judging else {}
        for result in results:
            rows += _rows(task, result, results[0], judged, config.seed)
    return SweepResult(frame=pd.DataFrame(rows, columns=list(COLUMNS)), folder=folder)


def _with_warm_ups(task: Task, warm_ups: list[int] | None) -> list[Task]:
    """The task as it is, or once for each length of the warm-up."""
    if warm_ups is None:
        return [task]
    return [replace(task, warm_up_tokens=tokens) for tokens in warm_ups]  # type: ignore[type-var]


def plan(profile: SkipProfile, config: SweepConfig) -> list[Arm]:
    """All arms of a task, the full model first. Refuses early what some arm could not do."""
    config = config.settled(profile.policy.warm_up_tokens)
    methods = [method for method in config.methods if method != "full"]
    for method in config.methods:
        check_method(method)
    if config.ratios is None and methods and profile.policy_for().method == "full":
        raise ConfigError("the profile recommends the full model; give a skip ratio with --target-skip-ratio")
    ratios = config.ratios or ([recommended_ratio(profile)] if methods else [])
    arms = [FULL, *(Arm(method, ratio) for method in methods for ratio in ratios)]
    if config.engine == VLLM_ENGINE:
        installed_version()
    for name in TASKS:
        settings = getattr(config.tasks, name)
        if settings is None:
            continue
        new_tokens = getattr(settings, "new_tokens", None) or settings.window_tokens
        for warm_up in config.warm_ups or [settings.warm_up]:
            for arm in arms:
                policy = make_policy(arm.method, profile, _ask(config, arm, new_tokens, warm_up))
                if name != TEACHER_FORCED:
                    check_policy(policy, config.engine)
    return arms


def _ask(config: SweepConfig, arm: Arm, new_tokens: int, warm_up_tokens: int) -> Ask:
    # Without ratios these are the profile's own policies, not the operating points next to them.
    own = config.ratios is None and arm.method in ("ffn-skip", "gate")
    return Ask(
        target_skip_ratio=None if own else arm.target_skip_ratio,
        new_tokens=new_tokens,
        warm_up_tokens=warm_up_tokens,
        seed=config.seed,
    )


class _Sweep:
    """What all arms share: the model, the profile, the configuration."""

    def __init__(self, subject: Subject, profile: SkipProfile, config: SweepConfig, folder: Path) -> None:
        self._subject = subject
        self._profile = profile
        self._config = config
        self._folder = folder
        self._about = model_identity(subject)

    def arms(self, task: Task, arms: list[Arm]) -> list[ArmResult]:
        """Results of all arms on one task, the full model's first."""
        return [
            run_arm(
                self._subject,
                task,
                arm,
                self._policy(task, arm),
                about=self._about_records(task),
                folder=self._folder / "records",
                batch_size=self._config.batch_size,
            )
            for arm in arms
        ]

    def _about_records(self, task: Task) -> dict[str, Any]:
        """All that decides a task's records besides task and policy."""
        return self._about if task.name == TEACHER_FORCED else {**self._about, **self._subject.host.header}

    def _policy(self, task: Task, arm: Arm) -> Policy:
        ask = _ask(self._config, arm, task.new_tokens, task.warm_up_tokens)
        policy = make_policy(arm.method, self._profile, ask)
        items = getattr(self._config.tasks, task.name).match_items
        if items and arm.method in MATCHED:
            assert arm.target_skip_ratio is not None
            return with_threshold(policy, self._matched(task, policy, arm.target_skip_ratio, items))
        return policy

    def _matched(self, task: Task, policy: Policy, target: float, items: int) -> float:
        """The tuned threshold, kept on disk: tuning takes several passes over its items."""
        ids = random.Random(self._config.seed).sample(list(task.ids), min(items, len(task.ids)))
        scale = threshold_scale(policy, self._profile)
        header = {
            "matching": task.name,
            "data": task.header(),
            "items": ids,
            "policy": with_threshold(policy, 1.0).to_dict(),
            "scale": scale.thresholds,
            **self._about_records(task),
        }
        path = self._folder / "records" / task.name / f"matched-{digest(header)}.jsonl"
        file = RecordFile(path, header)
        key = f"{target:g}"
        if key not in file.done:
            found = match_threshold(
                scale,
                target,
                lambda tried: measured_ratio(
                    self._subject, task, with_threshold(policy, tried), ids, self._config.batch_size
                ),
            )
            if abs(found.realised_skip_ratio - target) > 0.02:
                logger.warning(
                    "%s: the closest threshold found for %g realises %.3f", task.name, target,
                    found.realised_skip_ratio,
                )  # fmt: skip
            file.append({"id": key, "threshold": found.threshold, "realised": found.realised_skip_ratio})
        return float(file.done[key]["threshold"])


def model_identity(subject: Subject) -> dict[str, Any]:
    """All of a loaded model that decides what it answers, besides the prompt."""
    model: Any = subject.loaded.model
    tokenizer: Any = subject.loaded.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    config = {
        k: v
        for k, v in model.config.to_dict().items()
        if k not in ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
    }
    generation = {k: v for k, v in model.generation_config.to_dict().items() if k != "transformers_version"}
    return {
        "model": fingerprint(model),
        "revision": subject.loaded.revision,
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
        "config": digest(config),
        "generation_config": digest(generation),
        "opening": opening_names(tokenizer),
        "tokenizer": digest(backend.to_str() if backend else sorted(tokenizer.get_vocab().items())),
        "chat_template": digest(tokenizer.chat_template) if subject.chat_template else None,
    }


def _rows(
    task: Task,
    result: ArmResult,
    full: ArmResult,
    judged: dict[Arm, dict[str, Metrics]],
    seed: int,
) -> Iterator[dict[str, Any]]:
    """One row for each subset and metric of an arm."""
    mine = _shares(task, result, full, judged)
    theirs = _shares(task, full, full, judged)
    reports = {ALL: result.report()}
    for key in task.ids:
        if (subset := task.subset(key)) is not None and subset not in reports:
            reports[subset] = result.report(k for k in task.ids if task.subset(k) == subset)
    common = {
        "method": result.arm.method,
        "task": task.name,
        "target_skip_ratio": result.arm.target_skip_ratio,
        "unit": result.policy.unit,
        "warm_up_tokens": task.warm_up_tokens,
        "threshold": getattr(result.policy, "threshold", None) if result is not full else None,
        "seed": seed,
    }
    for (subset, metric), by_item in mine.items():
        scale = task.scales.get(metric, "mean")
        found = estimate(list(by_item.values()), scale, seed=seed)
        reference = theirs.get((subset, metric), {})
        both = [key for key in by_item if key in reference] if result is not full else []
        change = (
            difference([by_item[k] for k in both], [reference[k] for k in both], scale, seed=seed)
            if both
            else Estimate(math.nan, None, None, 0)
        )
        yield {
            **common,
            "subset": subset,
            "metric": metric,
            "realised_skip_ratio": reports[subset].skip_ratio,
            "skip_ratio_all": reports[subset].skip_ratio_all,
            "skip_ratio_bytes": reports[subset].skip_ratio_bytes,
            "value": found.value,
            "ci_low": found.ci_low,
            "ci_high": found.ci_high,
            "n": found.n,
            "difference": change.value,
            "difference_ci_low": change.ci_low,
            "difference_ci_high": change.ci_high,
        }


def _shares(
    task: Task, result: ArmResult, full: ArmResult, judged: dict[Arm, dict[str, Metrics]]
) -> dict[tuple[str, str], dict[str, Share]]:
    """Shares by subset and metric, then by item."""
    shares: dict[tuple[str, str], dict[str, Share]] = {}
    for key, record in result.records.items():
        metrics = {**task.metrics(record, full.records[key]), **judged.get(result.arm, {}).get(key, {})}
        for name, share in metrics.items():
            shares.setdefault(name, {})[key] = share
    return shares


def _has_template(loaded: LoadedModel) -> bool:
    return bool(getattr(loaded.tokenizer, "chat_template", None))
