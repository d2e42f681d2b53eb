"""`skipcal sweep --engine vllm` makes the records that the eager engine makes: texts and skips are equal."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import run
from served import Served
from vllm_process import SETTINGS

TASKS = ("continuation", "freebaseqa", "mtbench")
METHODS = ("full", "gate", "static", "random")


def data(folder: Path) -> list[str]:
    """Options that name a file for each task."""
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, 97)}" for _ in range(count))

    lines: dict[str, list[dict[str, Any]]] = {
        "freebaseqa": [
            {"id": f"q{n}", "question": words(draw.randrange(2, 9)), "answers": [words(1)]} for n in range(9)
        ],
        "mtbench": [
            {"question_id": n, "category": ("math", "roleplay")[n % 2], "turns": [words(4 + n), words(3)]}
            for n in range(5)
        ],
    }
    options = []
    for task, records in lines.items():
        file = folder / f"{task}.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        options += ["--data-files", f"{task}={file}"]
    return options


@dataclass(frozen=True)
class Folders:
    """Results of the same sweep, by engine."""

    eager: Path
    vllm: Path

    def headers(self, task: str, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
        mine, theirs = (_lines(folder, task, method)[0] for folder in (self.eager, self.vllm))
        return mine, theirs

    def records(self, task: str, method: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        mine, theirs = (_lines(folder, task, method)[1:] for folder in (self.eager, self.vllm))
        return mine, theirs


def _lines(folder: Path, task: str, method: str) -> list[dict[str, Any]]:
    pattern = f"{method}*.jsonl" if method == "full" else f"{method}-0.3*.jsonl"
    [file] = (folder / "records" / task).glob(pattern)
    return [json.loads(line) for line in file.read_text().splitlines()]


def ending(llama: Served, folder: Path) -> Path:
    """The model, for which every eighth word ends an answer."""
    shutil.copytree(llama.folder, folder)
    file = folder / "generation_config.json"
    ends = {"eos_token_id": list(range(2, 97, 8))}
    file.write_text(json.dumps({**json.loads(file.read_text()), **ends}))
    return folder


def swept(llama: Served, folder: Path, *options: str) -> Folders:
    """The same sweep by both engines, vLLM's in a process of its own."""
    model = str(ending(llama, folder / "model"))
    words = [
        "sweep", "--model", model, "--profile", str(llama.file), "--ratios", "0.3", "--device", "cpu",
        *options,
    ]  # fmt: skip
    run(*words, "--engine", "eager", "-o", folder / "eager")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | SETTINGS
    own = ["--engine", "vllm", "-o", str(folder / "vllm"), "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "skipcal.cli", *words, *own],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    assert json.loads(done.stdout)[0]["method"] == "full"  # and nothing of vLLM's is on stdout
    return Folders(folder / "eager", folder / "vllm")


@pytest.fixture(scope="module")
def folders(llama: Served, tmp_path_factory: pytest.TempPathFactory, worded_text: Path) -> Folders:
    folder = tmp_path_factory.mktemp("swept")
    return swept(
        llama, folder, *data(folder), "--data-files", str(worded_text), "--tasks", ",".join(TASKS),
        "--methods", "gate,static,random", "--new-tokens", "20", "--warm-up-tokens", "3", "--batch-size", "4",
    )  # fmt: skip


def summed(records: list[dict[str, Any]], count: str) -> list[int]:
    """A count over all records, by layer where it is; each record stands for its share of its batch."""
    values = [np.atleast_1d(record["report"][count]) / record["batch"] for record in records]
    return [round(total) for total in np.sum(values, axis=0).tolist()]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_records_are_those_of_the_eager_engine(task: str, method: str, folders: Folders) -> None:
    mine, theirs = folders.records(task, method)
    assert mine and [{**r, "batch": 0, "report": 0} for r in theirs] == [
        {**r, "batch": 0, "report": 0} for r in mine
    ]
    for count in ("decode_steps", "decode_steps_after_warm_up", "skipped_per_layer"):
        assert summed(theirs, count) == summed(mine, count), count
    assert any(summed(mine, "skipped_per_layer")) == (method != "full")


def test_some_answers_end_before_they_have_to(folders: Folders) -> None:
    lengths = {len(record["tokens"]) for record in folders.records("freebaseqa", "full")[1]}
    assert min(lengths) < max(lengths) == 20


def test_the_prompts_of_a_subset_are_one_group(folders: Folders) -> None:
    assert {record["batch"] for record in folders.records("freebaseqa", "gate")[1]} == {9}
    assert sorted(record["batch"] for record in folders.records("mtbench", "gate")[1]) == [2, 2, 3, 3, 3]


@pytest.mark.parametrize("method", METHODS)
def test_headers_differ_by_the_engine_alone(method: str, folders: Folders) -> None:
    mine, theirs = folders.headers("freebaseqa", method)
    assert theirs.pop("engine").startswith("vllm 0.32")
    assert theirs == mine
    assert json.loads((folders.vllm / "sweep.json").read_text())["config"]["engine"] == "vllm"


def test_one_at_a_time_even_the_bytes_that_are_not_read_are_the_same(llama: Served, tmp_path: Path) -> None:
    found = swept(
        llama, tmp_path, *data(tmp_path)[:2], "--tasks", "freebaseqa", "--methods", "gate,static",
        "--new-tokens", "16", "--batch-size", "1",
    )  # fmt: skip
    for method in ("gate", "static"):
        mine, theirs = found.records("freebaseqa", method)
        assert {record["batch"] for record in mine} == {1}
        for count in ("weight_bytes_saved", "skipped_per_layer"):
            assert summed(theirs, count) == summed(mine, count), (method, count)
        assert summed(mine, "weight_bytes_saved") != [0]
