"""Ratings of sweeps by a judge at a real local endpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from skipcal.arch.loading import LoadedModel
from skipcal.configs.sweep import SweepConfig
from skipcal.errors import JudgeError
from skipcal.evaluation.sweep import run_sweep
from skipcal.profiles.schema import SkipProfile


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A folder with a judge's plan and log, and its address."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder = tmp_path / "judge" / "one"
    folder.mkdir(parents=True)
    script = Path(__file__).parents[2] / "judge_server.py"
    command = [sys.executable, str(script), str(folder.parent)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield folder, f"http://127.0.0.1:{int(server.stdout.readline())}/one/v1"
    finally:
        server.kill()
        server.communicate()


def rated(text: str) -> dict[str, Any]:
    return {"*": [{"do": "ok", "content": text}]}


def config(tmp_path: Path, url: str, task: str, **judge: Any) -> SweepConfig:
    data = tmp_path / "data.jsonl"
    if task == "mtbench":
        settings: dict[str, Any] = {"new_tokens": 8, "warm_up_tokens": 2}
        rows: list[dict[str, Any]] = [
            {"question_id": n, "category": "writing", "turns": [f"w{n} w{n + 1}", "w9"]} for n in range(2)
        ]
    else:
        settings = {"items": 1, "new_tokens": 8, "warm_up_tokens": 2}
        rows = [{"id": str(words), "article": "w3 " * words, "highlights": "w3"} for words in (20, 480, 800)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SweepConfig.model_validate(
        {
            "profile": "p.json", "methods": ["random"], "ratios": [0.25], "batch_size": 4,
            "tasks": {task: {**settings, "data_file": str(data)}},
            "judge": {"model": "judge", "base_url": url, "retries": 1, "retry_wait_s": 0.001, **judge},
        }
    )  # fmt: skip


def log(folder: Path) -> list[Any]:
    path = folder / "log.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_mtbench_is_rated_in_both_turns_and_compared_in_both_orders(
    loaded: LoadedModel, profile: SkipProfile, tmp_path: Path, judge: tuple[Path, str]
) -> None:
    folder, url = judge
    (folder / "plan.json").write_text(json.dumps(rated("Both fine. [[7]] [[A]]")))
    settings = config(tmp_path, url, "mtbench", pairwise=True)
    frame = run_sweep(loaded, profile, settings, tmp_path / "out").frame
    sent = len(log(folder))
    assert sent == 2 * 2 * 2 + 2 * 2  # two arms, questions, turns; then both orders for one arm
    values = frame.set_index(["method", "subset", "metric"])["value"]
    for metric in ("judge_turn1", "judge_turn2", "judge_rating"):
        assert values["random", "all", metric] == values["random", "writing", metric] == 7.0
    assert values["random", "all", "judge_win_rate"] == 0.5  # always A: the orders contradict each other
    again = run_sweep(loaded, profile, settings, tmp_path / "out").frame
    assert again.equals(frame)
    assert len(log(folder)) == sent  # nothing was asked twice


def test_summaries_are_rated_in_four_qualities(
    loaded: LoadedModel, profile: SkipProfile, tmp_path: Path, judge: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder, url = judge
    (folder / "plan.json").write_text(json.dumps(rated("[[4]]")))
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 2048)
    frame = run_sweep(loaded, profile, config(tmp_path, url, "summarization"), tmp_path / "out").frame
    assert len(log(folder)) == 2 * 3 * 4
    ratings = frame[frame["metric"].str.startswith("judge_") & (frame["method"] == "random")]
    assert set(ratings["metric"]) == {
        "judge_coherence", "judge_consistency", "judge_fluency", "judge_relevance", "judge_rating",
    }  # fmt: skip
    assert set(ratings["subset"]) == {"all", "small", "medium", "large"}
    assert (ratings["value"] == 4.0).all()
    rouge = frame[(frame["metric"] == "rougeL") & (frame["subset"] == "all")]
    assert len(rouge) == 2


def test_unread_verdicts_are_left_out_and_counted(
    loaded: LoadedModel, profile: SkipProfile, tmp_path: Path, judge: tuple[Path, str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder, url = judge
    (folder / "plan.json").write_text(json.dumps(rated("I cannot say.")))
    frame = run_sweep(loaded, profile, config(tmp_path, url, "mtbench"), tmp_path / "out").frame
    assert not frame["metric"].str.startswith("judge_").any()
    assert "4 verdicts could not be read" in caplog.text
    raw = [json.loads(line) for p in (tmp_path / "out" / "judge").rglob("*.jsonl")
           for line in p.read_text().splitlines()[1:]]  # fmt: skip
    assert {record["raw"] for record in raw} == {"I cannot say."}
    assert {record["rating"] for record in raw} == {None}


def test_a_judge_that_refuses_loses_no_answer(
    loaded: LoadedModel, profile: SkipProfile, tmp_path: Path, judge: tuple[Path, str]
) -> None:
    folder, url = judge
    (folder / "plan.json").write_text(json.dumps({"*": [{"do": "status", "status": 401}]}))
    settings = config(tmp_path, url, "mtbench")
    with pytest.raises(JudgeError) as caught:
        run_sweep(loaded, profile, settings, tmp_path / "out")
    assert caught.value.exit_code == 5
    answers = {p: p.read_text() for p in (tmp_path / "out" / "records").rglob("*.jsonl")}
    assert len(answers) == 2  # both arms were run, and are kept
    (folder / "plan.json").write_text(json.dumps(rated("[[7]]")))
    frame = run_sweep(loaded, profile, settings, tmp_path / "out").frame
    assert (frame[frame["metric"] == "judge_rating"]["value"] == 7.0).all()
    assert {p: p.read_text() for p in answers} == answers
