"""Outputs that are no plain file: a link is followed, a device or a pipe is written to as it is."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from skipcal.errors import OutputError, OutputExists
from skipcal.files.writing import check_output, remove_output, write_text_atomic
from skipcal.profiles.schema import SkipProfile


def test_a_link_stays_one_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real, link = tmp_path / "real" / "a.json", tmp_path / "link.json"
    real.write_text("old")
    link.symlink_to(real)
    write_text_atomic(link, "new", overwrite=True)
    assert link.is_symlink()
    assert real.read_text() == "new"
    assert list(real.parent.iterdir()) == [real]


def test_a_link_to_nothing_yet_is_written_through(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(Path("new") / "a.json")
    check_output(link, overwrite=False)
    write_text_atomic(link, "x", overwrite=False)
    assert link.is_symlink()
    assert (tmp_path / "new" / "a.json").read_text() == "x"
    with pytest.raises(OutputExists, match=r"link\.json exists already"):
        write_text_atomic(link, "y", overwrite=False)


def test_a_link_that_leads_to_itself_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to(link)
    for step in (check_output, lambda path, overwrite: write_text_atomic(path, "x", overwrite=overwrite)):
        with pytest.raises(OutputError, match="leads to itself"):
            step(link, overwrite=True)
    assert link.is_symlink()


def test_an_output_that_is_taken_away_leaves_its_link(tmp_path: Path) -> None:
    real, link = tmp_path / "real.csv", tmp_path / "link.csv"
    real.write_text("old")
    link.symlink_to(real)
    remove_output(link)
    remove_output(tmp_path / "absent.csv")
    assert link.is_symlink()
    assert not real.exists()


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    path.chmod(0o600)
    write_text_atomic(path, "new", overwrite=True)
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_pipe_is_given_the_content_and_stays_one(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    check_output(pipe, overwrite=False)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    write_text_atomic(pipe, "x" * 100_000, overwrite=False)
    reader.join(timeout=10)
    assert got == ["x" * 100_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_device_is_given_the_content_and_nothing_lies_beside_it() -> None:
    before = sorted(os.listdir("/dev"))
    write_text_atomic(Path("/dev/null"), "x", overwrite=False)
    write_text_atomic(Path("/dev/null"), "x", overwrite=True)
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(os.listdir("/dev")) == before


def test_a_gate_needs_a_file_for_its_tensors_to_lie_beside(gated: SkipProfile) -> None:
    before = sorted(os.listdir("/dev"))
    with pytest.raises(OutputError, match="/dev/null is no file, and another goes beside it"):
        gated.save("/dev/null")
    assert sorted(os.listdir("/dev")) == before


def test_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path has room for 100 characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(OutputError, match="is a disk or a socket"):
            check_output(Path("socket"), overwrite=True)


def test_what_goes_to_stdout_stands_before_what_is_printed_next(tmp_path: Path) -> None:
    """Both are written through one descriptor, so neither is written over the other."""
    code = """
from pathlib import Path
from skipcal.files.writing import write_text_atomic
write_text_atomic(Path("/dev/stdout"), "the result\\n", overwrite=False)
print("and more")
"""
    with (tmp_path / "log").open("w") as log:
        subprocess.run([sys.executable, "-c", code], stdout=log, check=True)
    assert (tmp_path / "log").read_text() == "the result\nand more\n"


def test_a_name_of_255_bytes_is_written(tmp_path: Path) -> None:
    for path in (tmp_path / ("a" * 250 + ".json"), tmp_path / ("a." + "b" * 253)):
        check_output(path, overwrite=False)
        write_text_atomic(path, "x", overwrite=False)
        assert path.read_text() == "x"
