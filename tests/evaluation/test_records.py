from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from skipcal.errors import ConfigError, OutputError
from skipcal.evaluation.records import RecordFile

HEADER = {"kind": "test", "seed": 1}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "records.jsonl"


def written(path: Path, count: int = 3, header: dict[str, Any] = HEADER) -> bytes:
    file = RecordFile(path, header)
    for number in range(count):
        file.append({"id": f"r{number}", "value": number})
    return path.read_bytes()


def test_records_come_back_in_order(path: Path) -> None:
    content = written(path)
    again = RecordFile(path, HEADER)
    assert list(again.done) == ["r0", "r1", "r2"]
    assert again.done["r2"] == {"id": "r2", "value": 2}
    assert path.read_bytes() == content
    assert json.loads(content.split(b"\n")[0]) == {"format": "skipcal.records/1", **HEADER}


def test_each_record_is_on_disk_when_append_returns(path: Path) -> None:
    file = RecordFile(path, HEADER)
    file.append({"id": "a"})
    assert list(RecordFile(path, HEADER).done) == ["a"]


def test_a_file_cut_off_anywhere_goes_on_to_the_same_content(path: Path) -> None:
    content = written(path, count=2)
    for size in range(len(content)):
        path.write_bytes(content[:size])
        file = RecordFile(path, HEADER)
        for number in range(len(file.done), 2):
            file.append({"id": f"r{number}", "value": number})
        assert path.read_bytes() == content


@pytest.mark.parametrize("text", ["line\u2028end\r\n\x85", "\ud83d cut in half", "\U0001f600", "\0"])
def test_any_text_comes_back(path: Path, text: str) -> None:
    RecordFile(path, HEADER).append({"id": "a", "raw": text})
    assert RecordFile(path, HEADER).done["a"]["raw"] == text


def test_an_id_is_written_once(path: Path) -> None:
    written(path)
    with pytest.raises(ValueError, match="'r1' was written before"):
        RecordFile(path, HEADER).append({"id": "r1"})


def test_an_id_that_stands_twice_is_refused(path: Path) -> None:
    content = written(path)
    path.write_bytes(content + content.split(b"\n")[1] + b"\n")
    with pytest.raises(ConfigError, match=":5: the id 'r0' stands there twice"):
        RecordFile(path, HEADER)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({**HEADER, "seed": 2}, r"seed 1, now it is 2"),
        ({"kind": "test"}, r"seed 1, now it is None"),
        ({**HEADER, "top": "x"}, r"top None, now it is 'x'"),
    ],
)
def test_records_of_another_run_are_refused_and_kept(path: Path, header: dict[str, Any], says: str) -> None:
    content = written(path)
    with pytest.raises(ConfigError, match=says + r"; name another output, or pass --overwrite"):
        RecordFile(path, header)
    assert path.read_bytes() == content


@pytest.mark.parametrize("rest", [b"", b'{"id": "r'])
def test_a_run_without_records_does_not_stand_in_the_way(path: Path, rest: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(written(path, count=0, header={"kind": "test", "seed": 2}) + rest)
    RecordFile(path, HEADER).append({"id": "a"})
    assert list(RecordFile(path, HEADER).done) == ["a"]


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": "skipcal.profile/1"}',
        b'{"format": "skipcal.profile/1"}\n',
        b"\x89PNG\r\n\xff",
        b"a,b\n",
        b"\n",
    ],
)
def test_a_foreign_file_is_refused_and_kept(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no skipcal records; name another output"):
        RecordFile(path, HEADER)
    assert path.read_bytes() == content


@pytest.mark.parametrize("line", [b"", b"[]", b'{"value": 1}', b'{"id": 1}', b"\xff\xfe"])
def test_a_damaged_line_is_named(path: Path, line: bytes) -> None:
    content = written(path) + line + b"\n"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=":5: expected a JSON object with 'id'; the file is damaged"):
        RecordFile(path, HEADER)
    assert path.read_bytes() == content


def test_a_place_that_cannot_be_used_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "records.jsonl"):
        with pytest.raises(OutputError, match="cannot be used for records"):
            RecordFile(place, HEADER)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_an_output_error(tmp_path: Path) -> None:
    file = RecordFile(tmp_path / "records.jsonl", HEADER)
    file.path = Path("/dev/full")
    with pytest.raises(OutputError, match=r"cannot be written .*; finished records are kept"):
        file.append({"id": "a"})
    assert "a" not in file.done


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_file_that_may_not_be_written_is_an_output_error(path: Path) -> None:
    path.write_bytes(written(path)[:-1])
    path.chmod(stat.S_IRUSR)
    with pytest.raises(OutputError, match="cannot be written"):
        RecordFile(path, HEADER)
