"""Which settings a launch gets, and that no result depends on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from skipcal.errors import ConfigError
from skipcal.ops import ffn, project
from skipcal.ops import settings as module
from skipcal.ops.settings import (
    DEFAULTS,
    TABLE,
    Chip,
    Launch,
    Settings,
    chip,
    measured,
    read_table,
    row_class,
    settings_for,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def row(**changes: Any) -> dict[str, Any]:
    """A launch that was measured, as a file has it."""
    return {
        "kernel": "down", "rows": 16, "outputs": 72, "inputs": 104, "dtype": "float32", "device": "a card",
        "settings": [16, 32, 4, 2], "us": 2.0, "default_us": 3.0,
    } | changes  # fmt: skip


def written(path: Path, *rows: dict[str, Any], **changes: Any) -> Path:
    document = {"format": "skipcal.settings/1", "made_by": {"a card": {}}, "launches": rows} | changes
    path.write_text(json.dumps(document))
    return path


@pytest.fixture
def a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chip", lambda device: Chip("a card", 227 * 1024))


def test_rows_are_of_few_classes() -> None:
    assert [row_class(rows) for rows in (1, 2, 16, 17, 32, 33, 64)] == [1, 16, 16, 32, 32, 64, 64]
    assert all(list(by_rows) == [1, 16, 32, 64] for by_rows in DEFAULTS.values())


@pytest.mark.parametrize(
    ("shared_kib", "dtype", "stages"),
    [
        (227, torch.bfloat16, 10),  # nine tiles of 24 KiB
        (227, torch.float32, 5),  # four of 48
        (163, torch.bfloat16, 7),  # six, of 160 KiB
        (99, torch.bfloat16, 5),
        (99, torch.float32, 3),
        (48, torch.float32, 2),  # not one fits; whoever compiles it is told
    ],
)
def test_stages_are_those_that_fit_into_shared_memory(
    shared_kib: int, dtype: torch.dtype, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "chip", lambda device: Chip("a chip", shared_kib * 1024))
    x = torch.zeros(64, 256, dtype=dtype)
    assert settings_for("down", x, 4096, given=Settings(32, 128, 4, 10)) == (32, 128, 4, stages)
    one = Settings(4, 1024, 4, 10)
    assert settings_for("down", x[:1], 4096, given=one) == one  # its tiles are small


def test_two_matrices_side_by_side_take_twice_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "chip", lambda device: Chip("a chip", 99 * 1024))
    x, given = torch.zeros(16, 256), Settings(32, 128, 4, 9)
    assert settings_for("down", x, 4096, given=given).stages == 5  # (32 + 16) * 128 * 4 bytes
    assert settings_for("gate_up", x, 4096, given=given).stages == 3  # (64 + 16) * 128 * 4


def test_a_device_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    class Properties:
        name, shared_memory_per_block_optin = "a card", 1000

    def properties(device: torch.device) -> type[Properties]:
        asked.append(device)
        return Properties

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    device = torch.device("cuda", 117)  # of which nobody else will ask
    assert chip(device) == chip(device) == Chip("a card", 1000)
    assert asked == [device]


@pytest.mark.usefixtures("a_card")
def test_what_was_measured_comes_before_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = written(tmp_path / "t.json", row(), row(rows=1, settings=[1, 64, 1, 7]), row(device="another"),
                    made_by={"a card": {}, "another": {}})  # fmt: skip
    monkeypatch.setattr(module, "TABLE", table)
    x = torch.zeros(3, 104)
    assert settings_for("down", x, 72) == (16, 32, 4, 2)
    assert settings_for("down", x[:1], 72) == (1, 64, 1, 7)
    assert settings_for("down", x, 72, given=Settings(32, 64, 4, 3)) == (32, 64, 4, 3)
    for kernel, other, outputs in (
        ("gate_up", x, 72),
        ("down", x, 80),
        ("down", torch.zeros(3, 96), 72),
        ("down", torch.zeros(17, 104), 72),
        ("down", x.half(), 72),
    ):
        assert settings_for(kernel, other, outputs)[:3] == DEFAULTS[kernel][row_class(len(other))][:3]
    monkeypatch.setattr(module, "chip", lambda device: Chip("a third", 227 * 1024))
    assert settings_for("down", x, 72) == DEFAULTS["down"][16]


def test_the_table_that_is_shipped_can_be_read() -> None:
    table = read_table(TABLE)
    assert measured(TABLE) == {
        Launch(m.kernel, m.rows, m.outputs, m.inputs, m.dtype, m.device): m.settings for m in table.launches
    }


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        ([row(settings=[16, 24, 4, 2])], {}, "launches.0.settings.1: expected a power of two, got 24"),
        ([row(settings=[8, 32, 4, 2])], {}, "launches.0: blocks of several rows have 16 outputs"),
        ([row(settings=[16, 32, 4])], {}, "launches.0.settings"),
        ([row(settings=[16, 32, 4, 0])], {}, "greater than 0, got 0"),
        ([row(kernel="attend")], {}, "launches.0.kernel"),
        ([row(rows=8)], {}, "launches.0.rows"),
        ([row(us=float("nan"))], {}, "launches.0.us"),
        ([row(said=1)], {}, "launches.0.said: Extra inputs are not permitted"),
        ([row(), row(us=1.0)], {}, "is there twice"),
        ([row()], {"made_by": {}}, "made_by does not say what measured on a card"),
        ([], {"format": "skipcal.settings/2"}, "format: Input should be 'skipcal.settings/1'"),
    ],
)
def test_a_malformed_table_is_refused_in_one_line(
    rows: list[dict[str, Any]], changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"t\.json is no table of settings: ") as refused:
        read_table(written(tmp_path / "t.json", *rows, **changes))
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_what_is_no_json_object_is_no_table(text: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ConfigError, match="is no table of settings: "):
        read_table(path)
    with pytest.raises(ConfigError, match="is no table of settings: "):
        read_table(tmp_path / "none.json")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("odd", [Settings(64, 16, 2, 1), Settings(32, 128, 8, 4)])
def test_results_do_not_depend_on_settings(
    rows: int, odd: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, width, name = 72, 104, chip(torch.zeros(1, device=DEVICE).device).name
    launches = (("gate_up", width, hidden), ("down", hidden, width), ("project", 3 * hidden, hidden))
    entries = [
        row(kernel=kernel, rows=row_class(rows), outputs=n, inputs=k, device=name, settings=odd)
        for kernel, n, k in launches
    ]
    monkeypatch.setattr(module, "TABLE", written(tmp_path / "t.json", *entries, made_by={name: {}}))
    h, norm = torch.randn(rows, hidden, device=DEVICE), torch.rand(hidden, device=DEVICE)
    gate, up = (torch.randn(width, hidden, device=DEVICE) * hidden**-0.5 for _ in range(2))
    weights = ffn.FFNWeights(norm, 1e-5, gate, up, torch.randn(hidden, width, device=DEVICE) * width**-0.5)
    runs = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    f, sums = ffn.ffn(h, runs, weights)
    assert len(sums) == -(-hidden // odd.outputs), "the entry was not taken"
    torch.testing.assert_close(f, ffn.reference(h, runs, weights)[0], atol=1e-5, rtol=1e-5)
    matrices = [torch.randn(hidden, hidden, device=DEVICE) for _ in range(3)]
    y = project.project(h, matrices, norm=norm, eps=1e-5)
    torch.testing.assert_close(y, project.reference(h, matrices, norm=norm, eps=1e-5), atol=1e-4, rtol=1e-5)
