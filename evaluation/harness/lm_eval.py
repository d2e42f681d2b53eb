"""Standard tasks from lm-eval (EleutherAI/lm-evaluation-harness), answered by a model that skips.

`run_lm_eval` compares policies on tasks; `SkipLM` is the model for lm-eval's own interface. Importing
this module imports lm-eval, so nothing of skipcal does it unasked.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import set_seed

from skipcal.arch.loading import LoadedModel
from skipcal.arch.locate import locate
from skipcal.arch.patch import InstancePatches
from skipcal.core.policy import Policy
from skipcal.errors import ConfigError, Unavailable, first_words
from skipcal.evaluation.arms import Arm
from skipcal.evaluation.harness.required import TaskManager, aggregations, evaluator
from skipcal.evaluation.harness.skip_lm import SkipLM
from skipcal.evaluation.statistics import Estimate, Scale, Share, difference
from skipcal.evaluation.sweep import COLUMNS
from skipcal.evaluation.tasks.task import ALL
from skipcal.runtime.greedy import warn_of_overruled

logger = logging.getLogger(__name__)

Spec = str | Mapping[str, Any]  # a task: its name in lm-eval, a YAML file, or a configuration

# Resamples for metrics without a closed form. Their standard error is known to 2 % then; lm-eval's
# 100,000 take a pool of processes minutes.
RESAMPLES = 1000
Z_95 = 1.96
LONGEST_ANSWER = 256  # tokens, where a task sets no limit: lm-eval's default
SEED = 1234  # of few-shot examples: lm-eval's default, so that prompts are those of published results


@dataclass(frozen=True)
class _Outcome:
    """What one policy reached: lm-eval's aggregates, and sample values by task, filter and metric."""

    results: dict[str, dict[str, Any]]
    samples: dict[tuple[str, str, str], dict[int, Any]]


def run_lm_eval(
    loaded: LoadedModel,
    policies: Mapping[str, Policy] | Sequence[tuple[str | Arm, Policy]],
    tasks: Sequence[Spec],
    *,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    chat_template: bool = True,
    cache: Path | None = None,
    include_path: Path | None = None,
    seed: int = SEED,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Run each policy on each task; one row for each policy, task, filter and metric.

    policies:     by label, the `method` of the table. An Arm for a label gives the target skip ratio too.
                  Where one is the full model's, the others get their paired difference to it.
    tasks:        names of tasks, tags or groups, YAML files, or a task's configuration as a dict.
    limit:        first documents of each task; below 1, a share of them.
    cache:        folder that keeps answers, a file for each policy.
    include_path: folder with task files of your own.
    seed:         of few-shot examples, sampling and the differences' intervals.

    The columns are those of a sweep. `subset` is the filter ("all" for none); `value` is lm-eval's,
    with +/- 1.96 of its standard errors where it gives one. The warm-up matters here: see SkipLM.
    Raises ConfigError for an unknown task or one that cannot run, Unavailable without its data.
    """
    arms = _arms(policies)
    if not tasks:
        raise ConfigError("no lm-eval task was named; --lm-eval-tasks arc_easy,gsm8k would run two")
    if limit is not None and limit <= 0:
        raise ConfigError(f"limit {limit:g} leaves no document; expected a number above 0")
    architecture = locate(loaded.model)
    warn_of_overruled(loaded.model)
    models = [
        SkipLM(
            loaded,
            policy,
            batch_size=batch_size,
            chat_template=chat_template,
            cache=cache,
            label=arm.label,
            architecture=architecture,
        )
        for arm, policy in arms
    ]
    with _quiet_harness():
        loaded_tasks = _load_tasks(tasks, include_path)
        for task in loaded_tasks["tasks"].values():
            _settle(task, num_fewshot, gen_kwargs)
        outcomes = [_evaluate(lm, loaded_tasks, limit, seed) for lm in models]
    full = next((o for o, (_, policy) in zip(outcomes, arms, strict=True) if policy.method == "full"), None)
    rows = [
        row
        for (arm, _), lm, outcome in zip(arms, models, outcomes, strict=True)
        for row in _rows(arm, lm, outcome, full, loaded_tasks, seed)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _arms(policies: Mapping[str, Policy] | Sequence[tuple[str | Arm, Policy]]) -> list[tuple[Arm, Policy]]:
    pairs = list(policies.items()) if isinstance(policies, Mapping) else list(policies)
    arms = [(name if isinstance(name, Arm) else Arm(name, None), policy) for name, policy in pairs]
    labels = [arm.label for arm, _ in arms]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if not arms or twice:
        given = f"{twice[0]!r} twice" if twice else "none"
        raise ConfigError(f"expected policies under labels of their own, got {given}")
    return arms


def _evaluate(lm: SkipLM, tasks: dict[str, Any], limit: float | None, seed: int) -> _Outcome:
    set_seed(seed)
    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    found = evaluator.evaluate(
        lm=lm,
        task_dict=tasks,
        limit=limit,
        bootstrap_iters=RESAMPLES,
        apply_chat_template=lm.uses_chat_template,
        fewshot_as_multiturn=True,
    )
    samples: dict[tuple[str, str, str], dict[int, Any]] = {}
    for task, logged in found["samples"].items():
        for sample in logged:
            for metric in sample["metrics"]:
                key = (task, sample["filter"], metric)
                samples.setdefault(key, {})[sample["doc_id"]] = sample[metric]
    return _Outcome(found["results"], samples)


def _rows(
    arm: Arm, lm: SkipLM, outcome: _Outcome, full: _Outcome | None, tasks: dict[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    for name, scores in outcome.results.items():
        group = tasks["groups"].get(name)
        report = lm.report_on([each.task_name for each in group.get_all_tasks()] if group else [name])
        for entry, value in scores.items():
            metric, comma, kind = entry.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            half = Z_95 * error if isinstance(error, int | float) else None
            key = (name, kind, metric)
            change = Estimate(math.nan, None, None, 0)
            if full is not None and full is not outcome and not group:
                change = _change(tasks["tasks"][name], outcome.samples[key], full.samples[key], metric, seed)
            yield {
                "method": arm.method,
                "task": name,
                "subset": ALL if kind == "none" else kind,
                "metric": metric,
                "target_skip_ratio": arm.target_skip_ratio,
                "realised_skip_ratio": report.skip_ratio,
                "value": float(value),
                "ci_low": None if half is None else value - half,
                "ci_high": None if half is None else value + half,
                "n": len(outcome.samples.get(key, ())) or scores["sample_len"],
                "difference": change.value,
                "difference_ci_low": change.ci_low,
                "difference_ci_high": change.ci_high,
                "skip_ratio_all": report.skip_ratio_all,
                "skip_ratio_bytes": report.skip_ratio_bytes,
                "unit": report.unit,
                "warm_up_tokens": lm.policy.warm_up_tokens,
                "threshold": getattr(lm.policy, "threshold", None) if lm.policy.method != "full" else None,
                "seed": seed,
            }


# lm-eval's aggregations that are ratios of sums over samples, and so can be paired.
_PAIRED: dict[Any, tuple[Scale, Callable[[Any], Share]]] = {
    aggregations.mean: ("mean", lambda value: Share(float(value))),
    aggregations.perplexity: ("exp", lambda value: Share(-value)),
    aggregations.weighted_perplexity: ("exp", lambda pair: Share(-pair[0], pair[1])),
    aggregations.bits_per_byte: ("mean", lambda pair: Share(-pair[0] / math.log(2), pair[1])),
}


def _change(task: Any, mine: dict[int, Any], theirs: dict[int, Any], metric: str, seed: int) -> Estimate:
    """Difference to the full model on the same documents; NaN where the metric is no ratio of sums."""
    paired = _PAIRED.get(task.aggregation().get(metric))
    both = [doc for doc in mine if doc in theirs]
    if paired is None or not both:
        return Estimate(math.nan, None, None, 0)
    scale, share = paired
    return difference([share(mine[d]) for d in both], [share(theirs[d]) for d in both], scale, seed=seed)


# Tasks


def _load_tasks(tasks: Sequence[Spec], include_path: Path | None) -> dict[str, Any]:
    """Tasks and groups with their data. They are loaded once and serve all policies."""
    manager = _manager(tasks, include_path)
    found: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for spec in tasks:
        name = spec if isinstance(spec, str) else spec.get("task")
        try:
            part = manager.load(spec if isinstance(spec, str) else dict(spec))
        except (AttributeError, ImportError, KeyError, TypeError) as error:
            raise ConfigError(
                f"lm-eval task {name!r} cannot be used ({type(error).__name__}: {first_words(error)}); leave "
                "it out, or mend its file"
            ) from error
        except Exception as error:  # data sets fail in dozens of classes
            raise Unavailable(
                f"the data of lm-eval task {name!r} cannot be had ({type(error).__name__}: "
                f"{first_words(error)}); check the network and HF_HUB_OFFLINE, or name a task over local data"
            ) from error
        for kind in found:
            found[kind] |= part.get(kind, {})
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            needs = "runs code that a model wrote" if task.UNSAFE_CODE else "needs images or sound"
            raise ConfigError(f"lm-eval task {name!r} {needs}, which is not done here; leave it out")
    return found


def _manager(tasks: Sequence[Spec], include_path: Path | None) -> Any:
    """An index of tasks; lm-eval's own, which takes seconds to read, only if something of it is named."""
    if include_path is not None and not include_path.is_dir():
        raise ConfigError(f"include_path {str(include_path)!r} is no folder with task files")
    names = [spec for spec in tasks if isinstance(spec, str) and not spec.endswith((".yaml", ".yml"))]
    manager = TaskManager(include_path=include_path, include_defaults=False)
    if set(names) <= set(manager.all_subtasks):
        return manager
    manager = TaskManager(include_path=include_path)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3)
            hint = f"did you mean {', '.join(map(repr, close))}?" if close else "see: lm-eval ls tasks"
            raise ConfigError(f"lm-eval task {name!r} is not known; {hint}")
    return manager


def _settle(task: Any, num_fewshot: int | None, gen_kwargs: Mapping[str, Any] | None) -> None:
    """Override a task's settings, by the rules of lm-eval's `simple_evaluate`."""
    if gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(gen_kwargs), update=True)
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0 != num_fewshot:
        logger.warning("%s is a task without few-shot examples, and stays so", task.task_name)
    elif own is None or num_fewshot is not None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


@contextlib.contextmanager
def _quiet_harness() -> Iterator[None]:
    """lm-eval prints, draws bars into files and forks pools to resample; here it does not."""
    patches = InstancePatches()
    if not sys.stderr.isatty():
        for module in ("lm_eval.api.task", "tqdm"):  # the second for functions that import it when called
            module_ = importlib.import_module(module)
            patches.set(module_, "tqdm", functools.partial(module_.tqdm, disable=True))
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        patches.restore()
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
