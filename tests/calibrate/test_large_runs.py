"""Runs of several processes, and runs that were killed: the profile is that of one quiet run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from warm_python import environment

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.passes import Passes
from skipcal.profiles.schema import SkipProfile

BATCHES = 6  # two corpora of 6 prompts, 2 together

DYING = """
import os, signal
from skipcal.calibrate.passes import Passes

captured, calls = Passes.captured, []

def dying(self, prompts, first):
    calls.append(first)
    if os.environ["RANK"] == "1" and len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return captured(self, prompts, first)

Passes.captured = dying
from skipcal.cli import app
app()
"""


@pytest.fixture(scope="module")
def settings(worded: LoadedModel, worded_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two texts, and a configuration."""
    folder = tmp_path_factory.mktemp("settings")
    worded.model.save_pretrained(folder / "model")
    worded.tokenizer.save_pretrained(folder / "model")
    words = worded_text.read_text().split()
    (folder / "a.txt").write_text(" ".join(words[:700]))
    (folder / "b.txt").write_text(" ".join(words[700:]))
    values = {
        "prompts": 6, "batch_size": 2, "prompt_tokens": 8, "new_tokens": 8, "warm_up_tokens": 2,
        "closed_loop_prompts": 2, "cold_s": 1, "cold_e": 7, "max_skips": 2, "verify_prompts": 2,
        "model": "model", "device": "cpu", "data_files": "[a.txt, b.txt]",
    }  # fmt: skip
    (folder / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in values.items()))
    return folder


@pytest.fixture
def here(settings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(settings, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def quiet(settings: Path) -> dict[str, Any]:
    """The profile of one process that nothing interrupts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(settings)
        run("profile", "--config", "run.yaml", "-o", "quiet.json", "--verify")
        found = measured(settings / "quiet.json")
        (settings / "quiet.json").unlink()
        return found


COMMAND = ("profile", "--config", "run.yaml", "-o", "p.json", "--json", "--verify")


def measured(path: Path) -> dict[str, Any]:
    """A profile less what names the run itself."""
    return SkipProfile.load(path).model_dump(mode="json", exclude={"environment"})


def torchrun(python: str, *command: str) -> subprocess.CompletedProcess[str]:
    launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launch, *command], capture_output=True, text=True, check=False, env=environment(), timeout=300
    )


def assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers to 1e-6."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_close(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6)
    else:
        assert found == expected


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name not in ("a.txt", "b.txt", "model", "run.yaml"))


# Several processes


def test_two_processes_write_the_profile_of_one(here: Path, quiet: dict[str, Any], warm: str) -> None:
    done = torchrun(warm, "-m", "skipcal.cli", *COMMAND, "--trace", "t.parquet")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((here / "p.json").read_text())  # printed once
    assert SkipProfile.load("p.json").environment.processes == 2
    assert_close(measured(here / "p.json"), quiet)
    assert leftovers(here) == ["p.json", "t.parquet"]


def test_a_killed_process_ends_the_run_and_one_process_goes_on_from_there(
    here: Path, quiet: dict[str, Any], warm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "dying.py").write_text(DYING)
    done = torchrun(warm, "dying.py", *COMMAND)
    (here / "dying.py").unlink()
    assert done.returncode != 0
    assert done.stdout == ""
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "another process of this run is gone" in errors[0]
    assert leftovers(here) == ["p.json.unfinished"]
    finished = len(list(here.glob("p.json.unfinished/*/[0-9]*")))
    assert 1 <= finished < BATCHES
    calls = counted(monkeypatch)
    assert f"going on from {finished} of {BATCHES} batches" in run(*COMMAND).stderr
    assert len(calls) == BATCHES - finished
    assert_close(measured(here / "p.json"), quiet)
    assert leftovers(here) == ["p.json"]


@pytest.mark.parametrize("command", ["fit", "evaluate", "sweep", "tune", "bench", "compare", "generate"])
def test_a_command_that_does_not_divide_its_work_is_refused_under_torchrun(
    command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    needed = {
        "evaluate": ("--profile", "smollm2-135m-instruct"), "sweep": ("-o", str(tmp_path)),
        "compare": ("smollm2-135m-instruct",), "generate": ("--profile", "smollm2-135m-instruct"),
    }  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    assert "runs in one process, and 2 were started" in refused(command, *needed.get(command, ()), code=2)
    monkeypatch.setenv("RANK", "1")
    assert run(command, *needed.get(command, ()), code=2).stderr == ""


# Runs that were interrupted


def counted(monkeypatch: pytest.MonkeyPatch, *, stop_after: int | None = None) -> list[int]:
    """Count captured batches; the one after `stop_after` is interrupted."""
    captured = Passes.captured
    calls: list[int] = []

    def counting(self: Passes, prompts: list[list[int]], first: int) -> Any:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(first)
        return captured(self, prompts, first)

    monkeypatch.setattr(Passes, "captured", counting)
    return calls


def interrupt(*args: Any, **kwargs: Any) -> None:
    raise KeyboardInterrupt


def test_an_interrupted_run_goes_on_and_gives_the_same_profile(here: Path, quiet: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop_after=4)
        stopped = run(*COMMAND, code=130)
    assert stopped.stderr.splitlines()[-1] == (
        "interrupted: what is finished is kept in p.json.unfinished; give the same command again"
    )
    folder = next(here.glob("p.json.unfinished/*"))
    (folder / ".001-000002.x7.safetensors").write_bytes(b"half a file")  # of a kill while writing
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        again = run(*COMMAND)
    assert f"going on from 4 of {BATCHES} batches" in again.stderr
    assert calls == [2, 4]
    assert SkipProfile.load("p.json").environment.seconds is None
    assert measured(here / "p.json") == quiet
    assert leftovers(here) == ["p.json"]


def test_what_was_measured_is_not_measured_again(here: Path, quiet: dict[str, Any]) -> None:
    """An interrupt in the last step, writing: all passes through the model are behind it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SkipProfile, "save", interrupt)
        run(*COMMAND, code=130)
    assert leftovers(here) == ["p.json.unfinished"]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("captured", "teacher_forced", "decoded"):
            patch.setattr(Passes, name, lambda *args: pytest.fail("a pass was run again"))
        run(*COMMAND)
    assert measured(here / "p.json") == quiet


@pytest.mark.parametrize("changed", ["nothing", "seed", "text", "weights", "batch"])
def test_another_run_takes_nothing_from_an_unfinished_one(
    here: Path, worded: LoadedModel, changed: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop_after=3)
        run(*COMMAND, code=130)
    more = {"seed": ["--seed", "1"], "batch": ["--batch-size", "3"]}.get(changed, [])
    if changed == "text":
        (here / "b.txt").write_text("w5 " + (here / "b.txt").read_text())
    if changed == "weights":  # one value in the middle of a tensor, where no fingerprint looks
        model: Any = worded.model
        weight = model.model.layers[3].mlp.down_proj.weight
        before = float(weight[7, 9])
        weight[7, 9] += 0.5
        model.save_pretrained(here / "model")
        weight[7, 9] = before
    with pytest.MonkeyPatch.context() as patch:
        calls = counted(patch)
        patch.setattr(Passes, "teacher_forced", interrupt)  # all batches are captured by then
        done = run(*COMMAND, *more, code=130)
    assert ("going on from 3 of 6" in done.stderr) == (changed == "nothing")
    assert ("unfinished work of 1 run" in done.stderr) == (changed != "nothing")
    assert len(calls) == {"nothing": 3, "batch": 4}.get(changed, BATCHES)
    assert len(list(here.glob("p.json.unfinished/*"))) == (1 if changed == "nothing" else 2)


def test_an_error_before_the_first_batch_leaves_nothing(here: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counted(patch, stop_after=0)
        done = run(*COMMAND, code=130)
    assert done.stderr.splitlines()[-1] == "interrupted: no output was written or changed"
    assert leftovers(here) == []
