"""Configurations of `skipcal evaluate` and `skipcal sweep`: methods, ratios, tasks, judge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from skipcal.configs.names import DAMAGE, VLLM_ENGINE
from skipcal.configs.run import (
    HostName,
    ModelSettings,
    PositiveInt,
    given_options,
    read_yaml,
    validated,
    without_folder,
    without_places,
)
from skipcal.errors import ConfigError, suggestion

MATCHED = ("ffn-skip", "ffn-skip+surrogates", DAMAGE, "gate")  # methods whose ratio follows from a threshold
TASKS = ("perplexity", "continuation", "freebaseqa", "summarization", "mtbench")
Ratio = Annotated[float, Field(gt=0, le=1)]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class _TaskSettings(_Settings):
    """What every task has.

    match_items: before anything is scored, the thresholds of MATCHED are tuned by running so many of
                 the items, until the *realised* skip ratio meets the target there; 0: the profile's
                 thresholds. Without it methods are not compared at equal ratio, for a threshold
                 realises another ratio on every kind of text.
    warm_up_tokens: None: the profile's.
    """

    match_items: Annotated[int, Field(ge=0)] = 0
    warm_up_tokens: Annotated[int, Field(ge=0)] | None = None

    @property
    def warm_up(self) -> int:
        """The warm-up, after `SweepConfig.settled` has filled it in."""
        assert self.warm_up_tokens is not None
        return self.warm_up_tokens

    def check_warm_up(self, tokens: int) -> None:
        """Raise ValueError when a warm-up of `tokens` leaves nothing to measure."""

    @model_validator(mode="after")
    def _warm_up_leaves_something(self) -> Self:
        if self.warm_up_tokens is not None:
            self.check_warm_up(self.warm_up_tokens)
        return self


class TextSettings(_TaskSettings):
    """Text for perplexity and continuation: known corpora, hub ids or files, as in `skipcal profile`."""

    corpus: list[str] = []
    data_files: list[str] = []
    text_column: str = "text"


class PerplexitySettings(TextSettings):
    """Windows of `window_tokens` per corpus; their first `prompt_tokens` are the prefill."""

    windows: PositiveInt = 16
    window_tokens: Annotated[int, Field(ge=3)] = 512
    prompt_tokens: PositiveInt = 1

    def check_warm_up(self, tokens: int) -> None:
        """Raise ValueError when nothing would be scored past a warm-up of `tokens`."""
        if self.window_tokens - self.prompt_tokens - tokens < 2:
            raise ValueError(
                f"a window of {self.window_tokens} tokens has none past the prompt of {self.prompt_tokens} "
                f"and the warm-up of {tokens}; raise window_tokens or lower warm_up_tokens"
            )


class _Generating(_TaskSettings):
    new_tokens: PositiveInt

    def check_warm_up(self, tokens: int) -> None:
        """Raise ValueError when nothing would be skipped past a warm-up of `tokens`."""
        if self.new_tokens - 1 <= tokens:
            raise ValueError(
                f"none of {self.new_tokens} new tokens lies past the warm-up of {tokens}: every method would "
                "be the full model; raise new_tokens or lower warm_up_tokens"
            )


class ContinuationSettings(TextSettings, _Generating):
    """Prompts of `prompt_tokens` per corpus, continued."""

    prompts: PositiveInt = 16
    prompt_tokens: Annotated[int, Field(ge=2)] = 64
    new_tokens: PositiveInt = 128


class QuestionSettings(_Generating):
    """FreebaseQA. Answers are short, so the warm-up is too: 6 % of `new_tokens`, the paper's 5 to 10 %.

    data_file: the release's JSON, or .jsonl with id, question, answers.
    items:     drawn by seed; None: all.
    """

    data_file: str | None = None
    items: PositiveInt | None = None
    new_tokens: PositiveInt = 32
    warm_up_tokens: Annotated[int, Field(ge=0)] | None = 2


class SummarySettings(_Generating):
    """CNN/DailyMail in three buckets of article length.

    data_file: .jsonl or .parquet with article and highlights; None: the hub's test split.
    items:     per bucket, drawn by seed; the paper has 100.
    """

    data_file: str | None = None
    items: PositiveInt = 100
    new_tokens: PositiveInt = 128


class BenchSettings(_Generating):
    """MT-Bench in two turns.

    data_file:       FastChat's question.jsonl; None: the hub's copy.
    reference_file:  FastChat's reference answers, shown to the judge where there are some.
    items:           drawn by seed; None: all 80.
    """

    data_file: str | None = None
    reference_file: str | None = None
    items: PositiveInt | None = None
    new_tokens: PositiveInt = 512


class TaskSettings(_Settings):
    """The tasks to run: those that are given."""

    perplexity: PerplexitySettings | None = None
    continuation: ContinuationSettings | None = None
    freebaseqa: QuestionSettings | None = None
    summarization: SummarySettings | None = None
    mtbench: BenchSettings | None = None

    @field_validator("*", mode="before")
    @classmethod
    def _defaults_for_an_empty_entry(cls, value: Any) -> Any:
        return {} if value is None else value  # `perplexity:` alone on a line asks for the defaults


class JudgeOptions(_Settings):
    """An OpenAI-compatible endpoint that rates answers.

    prompts:  FastChat's judge_prompts.jsonl, instead of skipcal's own prompts.
    pairwise: also compare each answer with the full model's, in both orders.
    """

    model: str
    base_url: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float = 0.0
    max_tokens: PositiveInt = 1024
    max_tokens_option: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    retries: Annotated[int, Field(ge=0)] = 5
    retry_wait_s: Annotated[float, Field(ge=0)] = 1.0
    concurrency: PositiveInt = 8
    prompts: str | None = None
    pairwise: bool = False


# How the endpoint is reached decides no verdict: a mistyped address can be mended in the same folder.
_ENDPOINT = ("base_url", "api_key_env", "timeout_s", "retries", "retry_wait_s", "concurrency")


class SweepConfig(_Settings, ModelSettings):
    """Everything that decides the result of a sweep; `evaluate` is a sweep of one method.

    profile:      file, folder, name of a shipped one, or hub id.
    methods:      besides the full model, which is always run: it is what the others are compared with.
    ratios:       target skip ratios; None: the one the profile recommends.
    warm_ups:     lengths of the warm-up to run every method with, for the ablation; None: the tasks'.
    engine:       of what is generated, as `skipping` takes it, or "vllm"; perplexity is teacher-forced.
    """

    profile: str
    methods: Annotated[list[str], Field(min_length=1)] = ["ffn-skip"]
    ratios: Annotated[list[Ratio], Field(min_length=1)] | None = None
    warm_ups: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    tasks: TaskSettings
    judge: JudgeOptions | None = None
    batch_size: PositiveInt = 16
    chat_template: bool = True
    engine: HostName = "auto"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        asked: tuple[tuple[str, list[Any]], ...] = (
            ("method", self.methods),
            ("ratio", self.ratios or []),
            ("warm-up", self.warm_ups or []),
        )
        for what, values in asked:
            repeated = next((v for v in values if values.count(v) > 1), None)
            if repeated is not None:
                raise ValueError(f"{what} {repeated!r} is asked for twice")
        if not any(getattr(self.tasks, name) for name in TASKS):
            raise ValueError(f"no task is asked for; name some of {', '.join(TASKS)}")
        asked_for: list[_TaskSettings] = [
            task for name in TASKS if (task := getattr(self.tasks, name)) is not None
        ]
        if any(task.match_items for task in asked_for):
            if self.ratios is None:
                raise ValueError("match_items tunes thresholds for the ratios asked for; give ratios too")
            if not set(MATCHED) & set(self.methods):
                raise ValueError(
                    f"match_items tunes {', '.join(MATCHED)}, and none is among the methods; leave it out"
                )
        if self.engine == VLLM_ENGINE and not any(isinstance(task, _Generating) for task in asked_for):
            raise ValueError("engine 'vllm' decodes answers, and perplexity is teacher-forced; leave it out")
        if self.ratios is not None and set(self.methods) == {"full"}:
            raise ValueError("the full model skips nothing; name a method, or leave the ratios out")
        if self.judge is not None and self.tasks.summarization is None and self.tasks.mtbench is None:
            raise ValueError(
                "a judge rates summarization and mtbench, and neither is asked for; leave it out"
            )
        for task in asked_for:
            for tokens in self.warm_ups or []:
                task.check_warm_up(tokens)
        return self

    def settled(self, warm_up_tokens: int) -> SweepConfig:
        """The same with the profile's warm-up where a task names none.

        Raises ConfigError when that leaves a task nothing to measure.
        """
        filled = {}
        for name in TASKS:
            task: _TaskSettings | None = getattr(self.tasks, name)
            if task is not None and task.warm_up_tokens is None:
                try:
                    if self.warm_ups is None:
                        task.check_warm_up(warm_up_tokens)
                except ValueError as error:
                    raise ConfigError(f"{name}: {error} (the profile's warm-up)") from error
                filled[name] = task.model_copy(update={"warm_up_tokens": warm_up_tokens})
        return self.model_copy(update={"tasks": self.tasks.model_copy(update=filled)})

    def recorded(self) -> dict[str, Any]:
        """What a result keeps of it: no places on this computer."""
        kept = without_places(self.model_dump(mode="json"))
        if self.engine == "auto":  # results from before there was a choice stay as they are
            del kept["engine"]
        if kept["judge"]:
            for key in _ENDPOINT:
                del kept["judge"][key]
            if kept["judge"]["prompts"]:
                kept["judge"]["prompts"] = Path(kept["judge"]["prompts"]).name
        for task in kept["tasks"].values():
            for key, value in (task or {}).items():
                if key in ("data_file", "reference_file") and value:
                    task[key] = Path(value).name
                elif key == "data_files":
                    task[key] = [without_folder(entry) for entry in value]
        return kept


def load_sweep(path: Path | None, options: dict[str, Any]) -> SweepConfig:
    """The file's settings with command line options over them.

    Besides the fields of SweepConfig: `task` names tasks to run (each with the file's settings, else
    the defaults); `corpus`, `data_files`, `items`, `new_tokens`, `warm_up_tokens`, `match_items` go to
    the tasks they concern; `judge_*` to the judge. An option that concerns no task is an error.
    """
    settings = read_yaml(path) if path else {}
    given = given_options(options)
    tasks = _mapping(settings.get("tasks"), path, "tasks", "`name: {settings}`")
    names = given.pop("task", None) or list(tasks)
    for name in names:
        check_task(str(name))
    chosen = {
        name: dict(_mapping(tasks.get(name), path, f"tasks.{name}", "settings, or nothing for the defaults"))
        for name in names
    }
    if "warm_up_tokens" in given and "warm_ups" in settings:
        raise ConfigError("--warm-up-tokens has no effect where the file has warm_ups; leave one of them out")
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ConfigError(f"task {repeated!r} is asked for twice")
    if "chat_template" in given and not {"freebaseqa", "summarization", "mtbench"} & set(chosen):
        option = "--chat-template" if given["chat_template"] else "--no-chat-template"
        raise ConfigError(f"{option} has no effect on {', '.join(chosen)}; leave it out")
    if "engine" in given and set(chosen) <= {"perplexity"}:
        raise ConfigError("--engine has no effect on perplexity, which is teacher-forced; leave it out")
    if given.get("items", 1) < 1:
        raise ConfigError(f"--items {given['items']} cannot be used: expected 1 or more")
    for key in [key for key in given if key in _TASK_OPTIONS]:
        _hand_to_tasks(key, given.pop(key), chosen)
    judge = {key.removeprefix("judge_"): given.pop(key) for key in list(given) if key.startswith("judge_")}
    merged = {**settings, **given, "tasks": chosen}
    if judge:
        known = _mapping(settings.get("judge"), path, "judge", "settings of a judge")
        merged["judge"] = {**known, **judge}
        if "model" not in merged["judge"]:
            raise ConfigError("a judge needs a model; name it with --judge-model")
    return validated(SweepConfig, merged, {*given, *_TASK_OPTIONS, "task"} if not path else given, path)


def _mapping(value: Any, path: Path | None, key: str, expected: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"configuration {path}: {key}: expected {expected}, got {value!r}")
    return value


def check_task(name: str) -> None:
    """Raise ConfigError for an unknown task."""
    if name not in TASKS:
        hint = suggestion(name, TASKS)
        raise ConfigError(f"task {name!r} is not known; {hint} Tasks of lm-eval go with --lm-eval-tasks")


# Command line options that are settings of tasks, and what the tasks call them.
_TASK_OPTIONS = {
    "corpus": ("corpus",),
    "data_files": ("data_files",),
    "text_column": ("text_column",),
    "items": ("items", "windows", "prompts"),
    "window_tokens": ("window_tokens",),
    "new_tokens": ("new_tokens",),
    "warm_up_tokens": ("warm_up_tokens",),
    "match_items": ("match_items",),
}


def _hand_to_tasks(option: str, value: Any, tasks: dict[str, dict[str, Any]]) -> None:
    if option == "data_files":
        value = _own_files(value, tasks)
        if not value:
            return
    taken = False
    for name, settings in tasks.items():
        fields = _fields_of(name)
        for key in _TASK_OPTIONS[option]:
            if key in fields:
                settings[key] = value
                taken = True
                break
    if not taken:
        asked = ", ".join(tasks) or "no task at all"
        raise ConfigError(f"--{option.replace('_', '-')} {value!r} has no effect on {asked}; leave it out")


def _own_files(entries: list[str], tasks: dict[str, dict[str, Any]]) -> list[str]:
    """Give TASK=PATH to that task; return the rest, which is text for the others."""
    rest = []
    given: set[str] = set()
    for entry in entries:
        label, separator, path = entry.partition("=")
        if separator and label in TASKS and "data_file" in _fields_of(label):
            if label not in tasks:
                raise ConfigError(
                    f"--data-files {entry}: the task {label!r} is not asked for; add --task {label}"
                )
            if label in given:
                raise ConfigError(f"--data-files {entry}: the task {label!r} has a file already; give it one")
            given.add(label)
            tasks[label]["data_file"] = path
        else:
            rest.append(entry)
    return rest


def _fields_of(task: str) -> dict[str, Any]:
    kind = next(a for a in get_args(TaskSettings.model_fields[task].annotation) if a is not type(None))
    return dict(kind.model_fields)
