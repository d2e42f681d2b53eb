"""Sweep configurations: files, options over them, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipcal.configs.sweep import SweepConfig, load_sweep
from skipcal.errors import ConfigError

BASE: dict[str, Any] = {"profile": "p.json", "task": ["perplexity"]}


def test_options_go_to_the_tasks_they_concern() -> None:
    config = load_sweep(
        None,
        {
            **BASE,
            "task": ["perplexity", "freebaseqa", "continuation"],
            "data_files": ["freebaseqa=q.jsonl", "wiki=w.txt"],
            "items": 7,
            "new_tokens": 40,
            "warm_up_tokens": 3,
            "ratios": [0.1],
            "match_items": 5,
        },
    )
    tasks = config.tasks
    assert tasks.perplexity and tasks.freebaseqa and tasks.continuation
    assert tasks.freebaseqa.data_file == "q.jsonl"
    assert tasks.perplexity.data_files == tasks.continuation.data_files == ["wiki=w.txt"]
    assert (tasks.perplexity.windows, tasks.freebaseqa.items, tasks.continuation.prompts) == (7, 7, 7)
    assert (tasks.freebaseqa.new_tokens, tasks.continuation.new_tokens) == (40, 40)
    assert {t.warm_up_tokens for t in (tasks.perplexity, tasks.freebaseqa, tasks.continuation)} == {3}
    assert {t.match_items for t in (tasks.perplexity, tasks.freebaseqa, tasks.continuation)} == {5}
    assert tasks.mtbench is None and tasks.summarization is None


def test_options_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(
        "profile: a.json\nmethods: [random]\nratios: [0.1]\ntasks:\n  perplexity:\n  freebaseqa: {items: 9}\n"
        "  mtbench:\njudge: {model: one, concurrency: 2}\n"
    )
    plain = load_sweep(path, {})
    assert plain.tasks.perplexity is not None and plain.tasks.perplexity.windows == 16
    over = load_sweep(
        path, {"profile": "b.json", "task": ["freebaseqa", "mtbench"], "ratios": [0.3], "judge_model": "two"}
    )
    assert (over.profile, over.ratios, over.methods) == ("b.json", [0.3], ["random"])
    assert over.tasks.perplexity is None
    assert over.tasks.freebaseqa is not None and over.tasks.freebaseqa.items == 9
    assert over.judge is not None and (over.judge.model, over.judge.concurrency) == ("two", 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": ["perplexty"]}, "task 'perplexty' is not known; did you mean 'perplexity'"),
        ({"task": []}, "no task is asked for"),
        ({"new_tokens": 5}, "--new-tokens 5 has no effect on perplexity"),
        ({"data_files": ["freebaseqa=q.jsonl"]}, "the task 'freebaseqa' is not asked for"),
        ({"task": ["mtbench"], "data_files": ["x.txt"]}, "has no effect on mtbench"),
        ({"task": ["mtbench"], "corpus": ["c4"]}, "--corpus .* has no effect on mtbench"),
        ({"items": 0}, r"--items|windows"),
        ({"warm_up_tokens": 511}, "a window of 512 tokens has none past"),
        ({"ratios": [1.5]}, "ratios .*cannot be used"),
        ({"profile": None}, "profile is missing"),
        ({"judge_base_url": "http://localhost"}, "name it with --judge-model"),
        ({"judge_model": "m"}, "a judge rates summarization and mtbench"),
        ({"chat_template": False}, "--no-chat-template has no effect on perplexity"),
        (
            {"task": ["freebaseqa"], "data_files": ["freebaseqa=a.jsonl", "freebaseqa=b.jsonl"]},
            "has a file already",
        ),
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_sweep(None, {**BASE, **options})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methds: [random]", "unknown key 'methds'; did you mean 'methods'"),
        ("tasks: {perplexity: {windws: 3}}", "unknown key 'tasks.perplexity.windws'; did you mean 'windows'"),
        ("tasks: {perplexity: {windows: many}}", "tasks.perplexity.windows 'many' cannot be used"),
        ("tasks: [perplexity]", "expected `name: {settings}`"),
        ("judge: {modl: x}", "unknown key 'judge.modl'; did you mean 'model'"),
        ("judge: gpt-4", "judge 'gpt-4' cannot be used"),
        ("tasks: {perplexity: 5}", "tasks.perplexity: expected settings, or nothing .* got 5"),
        ("tasks: {perplexity: false}", "tasks.perplexity: expected settings, or nothing .* got False"),
        ("tasks: {5: {}}", "task '5' is not known"),
        ("methods: random", "methods 'random' cannot be used"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "s.yaml"
    path.write_text(f"profile: p.json\n{text}\n")
    options = {} if "tasks" in text else {"task": ["perplexity"]}
    with pytest.raises(ConfigError, match=message):
        load_sweep(path, options)


def test_what_is_recorded_names_no_place_on_this_computer(tmp_path: Path) -> None:
    (tmp_path / "p.json").touch()
    config = SweepConfig.model_validate(
        {
            "profile": str(tmp_path / "p.json"),
            "tasks": {
                "perplexity": {"data_files": [f"w={tmp_path}/a.txt"]},
                "mtbench": {"data_file": f"{tmp_path}/b.jsonl", "reference_file": f"{tmp_path}/r.jsonl"},
            },
            "judge": {"model": "m", "prompts": f"{tmp_path}/j.jsonl"},
        }
    )
    recorded = config.recorded()
    assert str(tmp_path) not in str(recorded)
    assert recorded["profile"] == "p.json"
    assert recorded["tasks"]["mtbench"]["reference_file"] == "r.jsonl"


def test_an_engine_is_recorded_where_one_is_asked_for() -> None:
    """Results from before there was a choice are those of the same settings."""
    options = {"profile": "p", "task": ["freebaseqa"], "corpus": None}
    assert "engine" not in load_sweep(None, options).recorded()
    assert load_sweep(None, {**options, "engine": "eager"}).recorded()["engine"] == "eager"


def test_the_profiles_warm_up_fills_in(tmp_path: Path) -> None:
    config = load_sweep(None, {**BASE, "task": ["perplexity", "freebaseqa"]})
    filled = config.settled(7).tasks
    assert filled.perplexity is not None and filled.perplexity.warm_up == 7
    assert filled.freebaseqa is not None and filled.freebaseqa.warm_up == 2
    with pytest.raises(ConfigError, match=r"perplexity: a window of 512 tokens has none .*profile's warm-up"):
        config.settled(511)


def test_a_warm_up_beside_the_files_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("profile: p.json\nwarm_ups: [0, 4]\ntasks: {perplexity: }\n")
    with pytest.raises(ConfigError, match="--warm-up-tokens has no effect where the file has warm_ups"):
        load_sweep(path, {"warm_up_tokens": 3})
