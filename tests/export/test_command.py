"""`skipcal export`: what it answers, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import refused, run
from conftest import lively, saved
from exporting import profile_file


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    model = lively("llama")
    saved(model, tmp_path / "model")
    return profile_file(tmp_path, model)


def test_it_says_which_ffns_are_left_out_and_what_to_type_next(profile: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("export", profile, "--target-skip-ratio", "0.5", "--model", tmp_path / "model", "-o", out)
    assert "left out      FFNs of 2 of 4 layers: 1, 3\n" in done.stdout
    assert f"wrote {out}; next: vllm serve {out}" in done.stdout
    json_out = tmp_path / "other"
    told = run("export", profile, "--model", tmp_path / "model", "-o", json_out, "--json")
    found = json.loads(told.stdout)
    assert found["target_skip_ratio"] == 0.1 and found["layers"] == [1]  # what the profile recommends
    assert found["output"] == str(json_out)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("static+surrogates", "no stock architecture has a map in an FFN's place; serve it by the plug-in"),
        ("gate", "method 'gate' cannot be exported: a checkpoint leaves out the same FFNs for every token"),
        ("shortgpt", "method 'shortgpt' cannot be exported"),
        ("full", "method 'full' cannot be exported"),
        ("statc", "did you mean 'static'?"),
    ],
)
def test_methods_that_no_checkpoint_can_hold_are_refused(
    method: str, message: str, profile: Path, tmp_path: Path
) -> None:
    assert message in refused("export", profile, "--method", method, "-o", tmp_path / "out", code=2)
    assert not (tmp_path / "out").exists()


def test_a_ratio_out_of_reach_and_an_output_that_exists_are_refused_first(
    profile: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    model = ("--model", tmp_path / "missing", "-o", out)
    assert "out of reach" in refused("export", profile, "--target-skip-ratio", "1", *model, code=2)
    out.mkdir()
    (out / "x").write_text("")
    assert "holds other files" in refused("export", profile, *model, code=2)


def test_a_profile_of_an_adapted_model_wants_it_merged(profile: Path, tmp_path: Path) -> None:
    found = json.loads(profile.read_text())
    found["model"]["adapter"] = "some/adapter"
    profile.write_text(json.dumps(found))
    assert "has the adapter some/adapter" in refused("export", profile, "-o", tmp_path / "out", code=2)
