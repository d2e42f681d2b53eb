"""`skipcal bench` and the figure of its result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run

from skipcal.speed import hardware

TINY = ("bench", "--shape", "tiny", "--device", "cpu", "--ratios", "0.125,0.25", "--context-tokens", "8",
        "--new-tokens", "3", "--rounds", "1")  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(hardware.COPY_BYTES, "cpu", 2**20)
    return tmp_path


def test_it_prints_a_table_writes_json_and_can_be_drawn(here: Path) -> None:
    done = run(*TINY, "--batch-size", "1", "--batch-size", "2", "-o", "b.json", "--engine", "eager")
    assert "random weights: speed only, no quality" in done.stdout
    assert "skipping 0.125" in done.stdout and "batch 2, context 8" in done.stdout
    assert "engine eager (asked for)" in done.stdout
    assert "wrote b.json; next: skipcal plot b.json -o speed.png" in done.stdout
    made = json.loads((here / "b.json").read_text())
    assert made["format"] == "skipcal.bench/1"
    assert [case["batch_size"] for case in made["cases"]] == [1, 2]
    run("plot", "b.json", "-o", "b.png")
    assert (here / "b.png").read_bytes().startswith(b"\x89PNG")


def test_json_is_one_document(here: Path) -> None:
    done = run(*TINY, "--json")
    made = json.loads(done.stdout)
    assert made["settings"]["ratios"] == [0.125, 0.25]
    assert made["cases"][0]["new_tokens"] == 3
    assert list(here.iterdir()) == []


def test_a_configuration_file_is_used_and_options_win(here: Path) -> None:
    (here / "bench.yaml").write_text(
        "shape: tiny\ndevice: cpu\nratios: [0.25]\ncontext_tokens: [4]\nrounds: 9\n"
    )
    done = run("bench", "--config", "bench.yaml", "--rounds", "1", "--new-tokens", "3", "--json")
    made = json.loads(done.stdout)
    assert made["cases"][0]["rounds"] == 1
    assert made["cases"][0]["context_tokens"] == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--shape", "tinny"], "shape 'tinny' is not known; did you mean 'tiny'?"),
        (["--model", "org/name"], "model 'org/name' and shape 'tiny' were both given"),
        (["--profile", "mine.json"], "profile 'mine.json' was not made for a shape"),
        (["--rule", "dice"], "--rule 'dice' cannot be used"),
        (["--ratios", "0.7"], "skip ratio 0.7 is out of reach"),
        (["--ratios", "25"], "--ratios 25"),
        (["--ratios", "a"], "--ratios 'a': expected numbers separated by commas"),
        (["--engine", "warp"], "engine 'warp' is not one of auto, eager"),
        (["--new-tokens", "2"], "--new-tokens 2 cannot be used"),
        (["--rounds", "0"], "--rounds 0 cannot be used"),
        (["--context-tokens", "600"], "do not fit the model's context of 512"),
        (["--device", "abacus"], "device 'abacus' cannot be used here"),
        (["--dtype", "int3"], "--dtype 'int3' cannot be used"),
        (["-o", "there.json"], "there.json exists already; pass --overwrite"),
    ],
)
def test_faulty_options_exit_with_2(here: Path, args: list[str], message: str) -> None:
    (here / "there.json").write_text("mine")
    done = run(*TINY, *args, code=2)
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (here / "there.json").read_text() == "mine"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--rule", "gate"],
            "rule 'gate' takes gate and surrogates from a profile; give --profile, or a --shape",
        ),
        (["--rule", "cosine", "--profile", "smollm2-135m-instruct"], "has no effect under rule 'cosine'"),
    ],
)
def test_a_rule_that_does_not_fit_the_profile_exits_with_2(args: list[str], message: str) -> None:
    assert message in run("bench", *args, code=2).stderr


def test_a_file_of_neither_format_is_no_figure(here: Path) -> None:
    (here / "x.json").write_text('{"format": "skipcal.bench/2"}')
    assert "expected 'skipcal.profile/1'" in run("plot", "x.json", "-o", "x.png", code=3).stderr
