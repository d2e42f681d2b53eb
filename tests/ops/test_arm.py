"""The decision between two layers: kernel and reference, and the states of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from skipcal.core.batch_rule import BATCH_RULES
from skipcal.ops.arm import NOBODYS, SPENT, UNLIMITED, WATCHING, arm, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sums_of(cosines: list[float], parts: int = 5) -> torch.Tensor:
    """Partial sums [parts, 3, rows] that give these cosines."""
    sums = torch.rand(parts, 3, len(cosines))
    sums = sums / sums.sum(0, keepdim=True)
    sums[:, 1] *= torch.tensor(cosines)
    return sums.to(DEVICE)


def decided(
    run: Callable[..., None],
    cosines: list[float],
    left: list[int],
    *,
    limit: int = UNLIMITED,
    live: list[int] | None = None,
    batch_rule: str = "rows",
) -> tuple[list[int], list[bool]]:
    rows = len(cosines)
    state = torch.tensor(left, dtype=torch.int32, device=DEVICE)
    following = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    run(
        sums_of(cosines),
        state,
        state > 0,
        following,
        live=torch.tensor(live or [1] * rows, dtype=torch.bool, device=DEVICE),
        threshold=torch.tensor([0.9], device=DEVICE),
        limit=torch.tensor([limit], dtype=torch.int32, device=DEVICE),
        batch_rule=batch_rule,
    )
    return state.tolist(), following.tolist()


BOTH = pytest.mark.parametrize("run", [arm, reference])


@BOTH
def test_a_watched_row_arms_at_the_threshold(run: Any) -> None:
    assert decided(run, [0.8, 0.95], [WATCHING, WATCHING], limit=3) == ([0, 3], [False, True])


@BOTH
def test_skips_are_counted_down_and_a_spent_row_never_arms_again(run: Any) -> None:
    assert decided(run, [0.99] * 3, [2, 1, SPENT], limit=2) == ([1, SPENT, SPENT], [True, False, False])


@BOTH
def test_without_a_limit_an_armed_row_skips_on(run: Any) -> None:
    left, skip = decided(run, [0.99], [UNLIMITED - 30])
    assert (left, skip) == ([UNLIMITED - 31], [True])


@BOTH
def test_no_skips_at_all_may_be_allowed(run: Any) -> None:
    assert decided(run, [0.99], [WATCHING], limit=0) == ([0], [False])


@BOTH
@pytest.mark.parametrize(
    ("batch_rule", "cosines", "live", "skips"),
    [
        ("rows", [0.95, 0.8, 0.99], [1, 1, 1], [True, False, True]),
        ("all", [0.95, 0.8, 0.99], [1, 1, 1], [False] * 3),
        ("all", [0.95, 0.8, 0.99], [1, 0, 1], [True] * 3),
        ("mean", [0.95, 0.8, 0.99], [1, 1, 1], [True] * 3),
        ("mean", [0.95, 0.7, 0.99], [1, 1, 1], [False] * 3),
        ("mean", [0.95, 0.7, 0.99], [1, 0, 1], [True] * 3),
    ],
)
def test_rows_may_be_asked_to_agree(
    run: Any, batch_rule: str, cosines: list[float], live: list[int], skips: list[bool]
) -> None:
    assert decided(run, cosines, [WATCHING] * 3, live=live, batch_rule=batch_rule)[1] == skips


@BOTH
@pytest.mark.parametrize("batch_rule", BATCH_RULES)
def test_sums_of_a_row_that_skipped_mean_nothing(run: Any, batch_rule: str) -> None:
    nan = float("nan")
    assert decided(run, [nan, nan], [4, 4], batch_rule=batch_rule) == ([3, 3], [True, True])


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_rows_have_thresholds_and_limits_of_their_own_and_padding_stays_nobodys(
    interpreted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    cosines = [0.85, 0.85, 0.95, 0.95, 0.5, 0.99]
    left = torch.tensor([WATCHING, WATCHING, WATCHING, SPENT, 2, NOBODYS], dtype=torch.int32, device=DEVICE)
    sums = sums_of(cosines)
    sums[:, :, -1] = torch.nan
    flags = torch.tensor([[0, 0, 0, 0, 1, -1], [9] * 6], dtype=torch.int8, device=DEVICE)
    arm(
        sums, left, flags[0], flags[1], live=torch.ones(6, dtype=torch.bool, device=DEVICE),
        threshold=torch.tensor([0.8, 0.9, 0.9, 0.9, 0.9, 0.0], device=DEVICE),
        limit=torch.tensor([3, 3, 0, 3, 3, 3], dtype=torch.int32, device=DEVICE),
    )  # fmt: skip
    assert left.tolist() == [3, WATCHING, 0, SPENT, 1, NOBODYS]
    assert flags[1].tolist() == [1, 0, 0, 0, 1, -1]
