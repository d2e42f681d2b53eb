"""`skipcal report`: the page of a profile with its model, and what is refused before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import refused, run
from conftest import saved
from documents import document, gate_document, write

from skipcal.arch.loading import LoadedModel
from skipcal.commands import report as command
from skipcal.commands.console import Console
from skipcal.evaluation.token_map import token_map
from skipcal.profiles.schema import SkipProfile
from skipcal.report.page import report_html

TEXT = " ".join(f"w{n}" for n in range(3, 30))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, worded: LoadedModel, worded_profile: SkipProfile) -> Path:
    folder = tmp_path_factory.mktemp("report")
    saved(worded.model, folder / "tiny")
    worded_profile.save(folder / "p.json")  # of the model "tiny", a folder here
    return folder


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def test_the_page_has_the_tokens_of_the_profiles_own_model(
    here: Path, worded: LoadedModel, worded_profile: SkipProfile
) -> None:
    done = run("report", "p.json", "-o", "page.html", "--text", TEXT, "--device", "cpu", "--json")
    assert json.loads(done.stdout) == {"output": "page.html"}
    tokens = token_map(worded.model, worded.tokenizer, worded_profile, TEXT)
    assert tokens.skip_ratio > 0
    assert (here / "page.html").read_text() == report_html(worded_profile, tokens)
    named = run("report", "p.json", "-o", "b.html", "--text", TEXT, "--model", "tiny", "--device", "cpu")
    assert named.stdout == "wrote b.html\n"
    assert (here / "b.html").read_bytes() == (here / "page.html").read_bytes()


def test_without_a_text_skipcals_own_is_shown(here: Path, worded: LoadedModel) -> None:
    run("report", "p.json", "-o", "page.html", "--device", "cpu")
    words: Any = worded.tokenizer
    count = len(words(command.SAMPLE_TEXT)["input_ids"])
    assert count > 50  # past a warm-up of 25
    assert f"{count}: prompt 1, warm-up 2" in (here / "page.html").read_text()


def test_without_tokens_no_model_is_needed(here: Path, worded_profile: SkipProfile) -> None:
    (here / "tiny").unlink()
    run("report", "p.json", "-o", "page.html", "--no-tokens")
    assert (here / "page.html").read_text() == report_html(worded_profile)
    error = refused("report", "p.json", "-o", "b.html", code=4)
    assert "the tokens need the profile's model" in error and "--no-tokens" in error
    assert not (here / "b.html").exists()


def test_what_cannot_be_done_is_refused_before_the_model_is_loaded(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(self: Any, options: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(Console, "load", load)
    (here / "old.html").write_text("mine")
    page = ("report", "p.json", "-o", "page.html")
    assert "ending '.pdf' is not .html; try a.html" in refused("report", "p.json", "-o", "a.pdf", code=2)
    assert "old.html exists already" in refused("report", "p.json", "-o", "old.html", code=2)
    assert "--text has no effect with --no-tokens" in refused(*page, "--no-tokens", "--text", "x", code=2)
    assert "--model has no effect" in refused(*page, "--no-tokens", "--model", "tiny", code=2)
    assert "--max-memory has no" in refused(*page, "--no-tokens", "--max-memory", "0=1GiB", code=2)
    assert "--trust-remote-code has" in refused(*page, "--no-tokens", "--trust-remote-code", code=2)
    assert "--text is empty" in refused(*page, "--text", " ", code=2)
    assert "is no file" in refused("report", "nothing.json", "-o", "page.html", code=4)
    write(here / "gate.json", gate_document())
    assert "tiny.surrogates.safetensors" in refused("report", "gate.json", "-o", "page.html", code=4)
    assert (here / "old.html").read_text() == "mine"
    assert not (here / "page.html").exists()


def test_a_profile_of_another_model_is_refused(here: Path) -> None:
    write(here / "other.json", document())
    error = refused("report", "other.json", "-o", "page.html", "--model", "tiny", "--device", "cpu", code=3)
    assert "number of layers 4, the model's is 8" in error
    assert not (here / "page.html").exists()


def test_a_text_of_too_many_tokens_is_refused(here: Path) -> None:
    long = " ".join(["w5"] * 513)
    error = refused("report", "p.json", "-o", "page.html", "--text", long, "--device", "cpu", code=2)
    assert "--text has 513 tokens; expected at most 512" in error
    error = refused("report", "p.json", "-o", "page.html", "--text", "w5", "--device", "cpu", code=2)
    assert "has 1 tokens" in error


def test_overwrite_replaces_the_page(here: Path) -> None:
    shutil.copy(here / "p.json", here / "page.html")
    run("report", "p.json", "-o", "page.html", "--no-tokens", "--overwrite")
    assert (here / "page.html").read_text().startswith("<!doctype html>")
