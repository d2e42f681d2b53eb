"""What a result says of the code that was measured."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from skipcal.speed import hardware


def test_the_commit_is_called_dirty_where_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        names = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(
            ["git", *names, *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    code = tmp_path / "speed" / "hardware.py"
    code.parent.mkdir()
    code.write_text("")
    monkeypatch.setattr(hardware, "__file__", str(code))
    assert hardware._commit() is None  # installed, not a checkout
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    git("tag", "v1")
    commit = git("rev-parse", "--short", "HEAD")
    assert hardware._commit() == commit
    code.write_text("changed = True")
    assert hardware._commit() == f"{commit}-dirty"
