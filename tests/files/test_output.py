"""Two runs and one output: the second is told at once, and a result that is there is kept."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from conftest import saved

from skipcal.arch.loading import LoadedModel
from skipcal.errors import OutputExists
from skipcal.files.output import Output
from skipcal.files.writing import write_text_atomic
from skipcal.profiles.schema import SkipProfile


def saving(text: str, *, overwrite: bool = False) -> Any:
    return lambda path: write_text_atomic(path, text, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_run_with_the_same_output_is_refused_at_once(tmp_path: Path, overwrite: bool) -> None:
    path = tmp_path / "a.json"
    first = Output(path, overwrite=overwrite)
    with pytest.raises(OutputExists, match=r"a\.json is what another run is at work on"):
        Output(path, overwrite=overwrite)
    (tmp_path / "link.json").symlink_to(path)
    with pytest.raises(OutputExists, match=r"link\.json is what another run"):
        Output(tmp_path / "link.json", overwrite=overwrite)
    Output(tmp_path / "b.json", overwrite=overwrite).release()
    first.release()
    first.release()
    second = Output(path, overwrite=overwrite)
    assert second.write(saving("x")) == path
    second.release()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "link.json"]


def test_a_run_that_was_killed_holds_no_name(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from skipcal.files.output import Output
Output(Path({str(tmp_path / "a.json")!r}), overwrite=False)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    Output(tmp_path / "a.json", overwrite=False).release()
    assert list(tmp_path.iterdir()) == []


def test_a_drive_without_locks_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    output = Output(tmp_path / "a.json", overwrite=False)
    assert output.write(saving("x")) == tmp_path / "a.json"


def test_a_result_whose_name_was_taken_meanwhile_is_kept_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.json"
    output = Output(path, overwrite=False)
    path.write_text("theirs")
    (tmp_path / "a-2").mkdir()
    with caplog.at_level(logging.WARNING):
        assert output.write(saving("mine")) == tmp_path / "a-3" / "a.json"
    output.release()
    assert path.read_text() == "theirs"
    assert (tmp_path / "a-3" / "a.json").read_text() == "mine"
    assert f"{path} was written by another run meanwhile; this one's is {tmp_path}/a-3/a.json" in caplog.text


def test_a_gate_that_is_kept_beside_has_its_tensors_with_it(gated: SkipProfile, tmp_path: Path) -> None:
    output = Output(tmp_path / "a.json", overwrite=False, alone=False)
    assert gated.gate is not None
    (tmp_path / gated.gate.tensors).write_bytes(b"theirs")
    place = output.write(lambda path: gated.save(path))
    output.release()
    assert SkipProfile.load(place).tensors().raw == gated.tensors().raw
    assert not (tmp_path / "a.json").exists()


COMMANDS = {
    "profile": ("profile",),
    "fit": ("fit", "--profile", "smollm2-135m-instruct"),
    "tune": ("tune", "--profile", "smollm2-135m-instruct", "--max-kl", "0.1"),
    "report": ("report", "smollm2-135m-instruct"),
    "sweep": ("sweep", "--profile", "smollm2-135m-instruct", "--tasks", "perplexity", "--ratios", "0.1"),
    "evaluate": ("evaluate", "--profile", "smollm2-135m-instruct", "--task", "perplexity"),
    "lm-eval": ("evaluate", "--profile", "smollm2-135m-instruct", "--lm-eval-tasks", "arc_easy"),
    "compare": ("compare", "smollm2-135m-instruct", "--corpus", "embedded"),
}
HELD = {
    "sweep": "o/sweep.json",
    "evaluate": "o/sweep.json",
    "lm-eval": "o/results.csv",
    "compare": "o/compare.json",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_no_command_loads_a_model_for_an_output_that_another_run_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def loaded(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("skipcal.arch.loading.load_model", loaded)
    monkeypatch.chdir(tmp_path)
    output = "o.html" if name == "report" else "o"
    other = Output(Path(HELD.get(name, output)), overwrite=True)
    said = refused(*COMMANDS[name], "-o", output, "--overwrite", code=2)
    other.release()
    assert "is what another run is at work on; wait for it, or name another file" in said


def test_a_profile_whose_name_was_taken_while_it_was_made_is_not_lost(
    worded: LoadedModel, worded_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skipcal.calibrate import pipeline

    target, real = tmp_path / "a.json", pipeline.calibrate_together

    def slow(*args: Any) -> Any:
        result = real(*args)
        target.write_text("theirs")
        return result

    monkeypatch.setattr(pipeline, "calibrate_together", slow)
    model = saved(worded.model, tmp_path / "model")
    done = run(
        "profile", "--model", model, "--data-files", worded_text, "--prompts", "4", "--prompt-tokens", "8",
        "--new-tokens", "8", "--warm-up-tokens", "2", "--cold-s", "1", "--cold-e", "7", "-o", target,
    )  # fmt: skip
    place = tmp_path / "a-2" / "a.json"
    assert target.read_text() == "theirs"
    assert SkipProfile.load(place).calibration.prompt_tokens == 8
    assert f"was written by another run meanwhile; this one's is {place}" in done.stderr
    assert f"wrote {place}; next: skipcal plot {place}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2", "a.json", "model"]


def test_a_profile_is_written_to_a_device_and_nothing_beside_it(
    worded: LoadedModel, worded_text: Path, tmp_path: Path
) -> None:
    before = sorted(os.listdir("/dev"))
    model = saved(worded.model, tmp_path / "model")
    run(
        "profile", "--model", model, "--data-files", worded_text, "--prompts", "4", "--prompt-tokens", "8",
        "--new-tokens", "8", "--warm-up-tokens", "2", "--cold-s", "1", "--cold-e", "7", "-o", "/dev/null",
    )  # fmt: skip
    assert sorted(os.listdir("/dev")) == before
