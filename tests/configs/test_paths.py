"""`~` in paths: in every option that takes one, and in YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import refused, run

from skipcal.cli import app
from skipcal.configs.paths import PATHS, at_home
from skipcal.configs.run import load_config
from skipcal.configs.sweep import load_sweep

SHIPPED = "smollm2-135m-instruct"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_every_option_that_takes_a_path_is_known() -> None:
    commands: Any = typer.main.get_command(app)
    found = {
        parameter.name
        for each in commands.commands.values()
        for parameter in each.params
        if any(kind in (parameter.metavar or "") for kind in ("FILE", "FOLDER", "PROFILE"))
    }
    assert {"output", "profile", "data_files"} <= found
    assert found | {"model", "adapter"} <= PATHS


def test_an_option_may_begin_with_a_tilde(home: Path) -> None:
    run("plot", SHIPPED, "--output=~/curve.svg")
    assert (home / "curve.svg").is_file()
    (home / "own.json").write_text("{}")
    for command in (("show",), ("evaluate", "--task=perplexity", "--profile"), ("compare", SHIPPED)):
        assert f"{home}/own.json is not a profile" in refused(*command, "~/own.json", code=3)
    message = refused("profile", "--data-files=x=~/none.txt", "--output=~/o.json", "--model=~/none", code=4)
    assert f"model '{home}/none' could not be loaded" in message
    assert f"configuration {home}/c.yaml cannot be read" in refused("profile", "--config=~/c.yaml", code=2)


def test_yaml_may_have_tildes_wherever_it_names_a_path(home: Path) -> None:
    file = home / "run.yaml"
    file.write_text("model: ~/m\noutput: ~/o.json\ntrace: ~/t.parquet\ndata_files: [~/a.txt, b=~/b.jsonl]\n")
    settings = load_config(file, {})
    assert (settings.model, settings.output, settings.trace) == tuple(
        f"{home}/{name}" for name in ("m", "o.json", "t.parquet")
    )
    assert settings.data_files == [f"{home}/a.txt", f"b={home}/b.jsonl"]
    file.write_text(
        "profile: ~/p.json\ntasks:\n  freebaseqa: {data_file: ~/q.json}\n"
        "  perplexity: {data_files: [~/a.txt]}\n"
    )
    sweep = load_sweep(file, {})
    assert sweep.profile == f"{home}/p.json"
    assert sweep.tasks.freebaseqa is not None
    assert sweep.tasks.freebaseqa.data_file == f"{home}/q.json"
    assert sweep.tasks.perplexity is not None
    assert sweep.tasks.perplexity.data_files == [f"{home}/a.txt"]


def test_what_only_looks_like_it_stays(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    (home / "~").mkdir()
    (home / "~" / "a.txt").write_text("x")
    (home / "b=~").write_text("x")
    for name, value in {
        "model": "org/~name", "data_files": ["~/a.txt", "b=~", "x~y"], "prompt": "~/b", "text_column": "~",
        "output": None, "prompts": 4,
    }.items():  # fmt: skip
        assert at_home(name, value) == value
    assert at_home("output", Path("~/b")) == home / "b"
    assert at_home("data_files", ("x=~/b",)) == (f"x={home}/b",)
