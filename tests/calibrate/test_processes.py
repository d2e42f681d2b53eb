"""What processes know of each other before they meet; how they meet is in test_large_runs.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from skipcal.calibrate.processes import ALONE, Processes, with_own_device
from skipcal.errors import ConfigError, ProcessFailed, Unavailable

TORCHRUN = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "1"}


def test_torchruns_variables_say_which_process_this_is() -> None:
    assert Processes.started(TORCHRUN) == Processes(rank=3, size=4, local_rank=1)
    assert Processes.started({}) == ALONE
    assert Processes.started({"WORLD_SIZE": "1", "RANK": "0"}) == ALONE


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'; expected a number"),
        ({"RANK": "-1"}, "RANK is '-1'; expected a number"),
        ({"MASTER_ADDR": None}, "WORLD_SIZE is 4, but MASTER_ADDR is not set; start several processes with"),
    ],
)
def test_variables_that_make_no_sense_are_refused(change: dict[str, Any], message: str) -> None:
    variables = {name: value for name, value in {**TORCHRUN, **change}.items() if value is not None}
    with pytest.raises(ConfigError, match=message):
        Processes.started(variables)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_each_item_is_in_one_share_and_shares_are_even(size: int) -> None:
    shares = [Processes(rank, size, rank).mine(range(11)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_meets_nobody() -> None:
    assert ALONE.agree(lambda: 3) == ALONE.share(lambda: 3) == ALONE.in_turn(lambda: 3) == 3
    assert ALONE.share(lambda: [None]) == [None]

    def lengths(order: str) -> tuple[int, ...]:
        return (len(order),)

    assert ALONE.directed(lambda ask: ask("four")[0] + 1, lengths) == 5
    with pytest.raises(Unavailable, match="no text"):
        ALONE.share(lambda: fail(Unavailable("no text")))


def fail(error: Exception) -> None:
    raise error


def test_a_failure_at_work_names_its_process() -> None:
    second = Processes(rank=1, size=2, local_rank=1)
    with pytest.raises(ProcessFailed, match="process 1 of 2: MemoryError: too many"):
        second.working(lambda: fail(MemoryError("too many\nlines")))
    with pytest.raises(MemoryError):
        Processes(rank=0, size=2).working(lambda: fail(MemoryError("its own")))


def options(**given: Any) -> dict[str, Any]:
    return {"device": None, "device_map": None, "model": "m", **given}


def test_each_process_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    second = Processes(rank=5, size=8, local_rank=1)
    assert with_own_device(options(device="cpu"), second) == options(device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert with_own_device(options(), second) == options(device="cuda:1")
    assert with_own_device(options(device="cuda"), second) == options(device="cuda:1")
    assert with_own_device(options(device="cuda:0", device_map="auto"), ALONE) == options(
        device="cuda:0", device_map="auto"
    )
    with pytest.raises(ConfigError, match="--device cuda:0 would put 8 processes on one device"):
        with_own_device(options(device="cuda:0"), second)
    with pytest.raises(ConfigError, match="--device-map auto spreads a model over all devices"):
        with_own_device(options(device_map="auto"), second)
    with pytest.raises(ConfigError, match="process 6 is number 3 on a machine with 2 GPUs"):
        with_own_device(options(), Processes(rank=6, size=8, local_rank=2))
