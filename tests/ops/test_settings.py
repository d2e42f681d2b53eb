"""Which settings a launch gets, and that no result depends on them."""

from __future__ import annotations

import pytest
import torch

from skipcal.ops import settings as module
from skipcal.ops.settings import DEFAULTS, Chip, Settings, chip, row_class, settings_for


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
