"""Atomic writes: a reader sees the old file or the new one, whatever goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from skipcal.errors import OutputError, OutputExists
from skipcal.files.writing import check_output, dump_json, write_atomic, write_text_atomic


def test_json_has_sorted_keys_and_one_line_per_array_of_numbers() -> None:
    value = {"b": [1, 2.5, -3e-05], "a": {"deep": [[1, 2], [3]]}, "c": ["x", 1], "d": [], "e": "[ 1, 2 ]"}
    text = dump_json(value)
    assert json.loads(text) == value
    assert '"b": [1, 2.5, -3e-05]' in text
    assert text.index('"a"') < text.index('"b"')
    assert "[1, 2]," in text
    with pytest.raises(ValueError, match="JSON"):
        dump_json({"a": float("nan")})


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match=r"a\.json cannot be written \(No space left on device\)"):
        write_atomic(path, fail, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupt_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def interrupted(partial: Path) -> None:
        partial.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, interrupted, overwrite=True)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """The kernel refuses the write itself: a process may write files of at most 4096 bytes."""
    code = f"""
import resource, signal
from pathlib import Path
from skipcal.errors import OutputError
from skipcal.files.writing import write_text_atomic
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write_text_atomic(Path({str(tmp_path / "a.json")!r}), "x" * 100_000, overwrite=False)
except OutputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a.json cannot be written (File too large)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"

    def slow(partial: Path) -> None:
        partial.write_text("mine")
        path.write_text("theirs")

    with pytest.raises(OutputExists):
        write_atomic(path, slow, overwrite=False)
    assert path.read_text() == "theirs"
    assert list(tmp_path.iterdir()) == [path]


def test_a_drive_without_hard_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("os.link", no_links)
    write_text_atomic(tmp_path / "a.json", "x", overwrite=False)
    assert (tmp_path / "a.json").read_text() == "x"
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


def test_outputs_are_checked_before_long_work(tmp_path: Path) -> None:
    check_output(tmp_path / "new" / "a.json", overwrite=False)
    assert (tmp_path / "new").is_dir()
    with pytest.raises(OutputError, match="is a folder"):
        check_output(tmp_path, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(tmp_path / "file" / "a.json", overwrite=False)
    with pytest.raises(OutputError, match="cannot be written"):
        check_output(Path("/proc/skipcal/a.json"), overwrite=False)


def test_the_file_has_ordinary_permissions(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    write_text_atomic(tmp_path / "a.json", "x", overwrite=False)
    assert (tmp_path / "a.json").stat().st_mode == plain.stat().st_mode
