"""Terminals that lack a character, and text that comes in another encoding than they say."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from skipcal.cli import app
from skipcal.commands.console import check_typed, command
from skipcal.errors import ConfigError
from skipcal.profiles.schema import SkipProfile

SHIPPED = "smollm2-135m-instruct"
TEXT = "Füße: 日本 \N{GRINNING FACE}"


def shown(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a terminal that has ASCII alone is given of a streamed text, a remark and a result."""
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with command(as_json, False) as console:
        if not as_json:
            sys.stdout.write(TEXT + "\n")  # as generate does, piece by piece
        console.say(TEXT)
        console.result({"text": TEXT}, TEXT)
        console.document(json.dumps({"text": TEXT}, ensure_ascii=False) + "\n", TEXT)
    return raw.getvalue().decode("ascii")


def test_a_character_that_a_terminal_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    assert shown(False, monkeypatch) == "F??e: ?? ?\n" * 4


def test_json_says_every_character_in_ascii(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(True, monkeypatch)
    first, end = json.JSONDecoder().raw_decode(text)
    assert first == json.loads(text[end:]) == {"text": TEXT}


def skipcal(*args: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8"))}
    return subprocess.run(
        [sys.executable, "-m", "skipcal.cli", *args],
        capture_output=True,
        env={**env, **environment},
        check=False,
    )


def test_a_profile_with_names_of_any_script_is_shown_anywhere(tmp_path: Path) -> None:
    text = SkipProfile.load(SHIPPED).to_json().replace('"c4"', '"日本"')
    (tmp_path / "p.json").write_text(text, encoding="utf-8")
    done = skipcal("show", str(tmp_path / "p.json"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"??" in done.stdout
    done = skipcal("show", str(tmp_path / "p.json"), "--json", PYTHONIOENCODING="ascii")
    assert json.loads(done.stdout.decode("ascii")) == json.loads(text)


def test_a_prompt_in_another_encoding_is_explained_in_one_line() -> None:
    typed = ("generate", "--profile", SHIPPED, "--prompt", "hällo".encode("latin-1"))
    done = skipcal(*typed, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode("ascii") == (
        "error: --prompt 'h\\udce4llo' is no ascii text, as LANG and LC_ALL have it; set them to UTF-8, or "
        "give the text in a file where there is an option for one\n"
    )


def test_what_is_typed_may_have_any_character() -> None:
    check_typed("--prompt", TEXT)
    for half in ("\ud800", "\udcff", "a\udfffb"):
        with pytest.raises(ConfigError, match=r"--text .* is no "):
            check_typed("--text", half)


def test_the_help_needs_ascii_alone() -> None:
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="skipcal")
    for name, each in group.commands.items():  # type: ignore[attr-defined]
        assert each.get_help(typer.Context(each, info_name=name, parent=context)).isascii(), name
    assert group.get_help(context).isascii()
