"""The step's counters: one launch against a loop over rows in Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipcal.ops import count as module
from skipcal.ops.count import count, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
both = pytest.mark.parametrize("op", [count, reference])


def flags(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.bool, device=DEVICE)


def counters(layers: int) -> dict[str, Tensor]:
    """Not zero, and beyond int32: a session is long."""
    per_layer = torch.arange(3 * layers, device=DEVICE).view(3, layers) + 2**40
    return {"per_layer": per_layer, "agreement": torch.tensor([5, 2**33], device=DEVICE)}


def counted(
    op: Any, skips: Tensor, live: Sequence[int], active: Sequence[int], ruled: Sequence[int]
) -> list[Any]:
    """What `op` adds: [skipped, by all, by some] by layer, and [alike, decisions]."""
    after = counters(len(ruled))
    op(skips, flags(live), flags(active), ruled=flags(ruled), **after)
    before = counters(len(ruled))
    return [(after[name] - before[name]).tolist() for name in ("per_layer", "agreement")]


def by_hand(skips: list[list[bool]], live: list[bool], active: list[bool], ruled: list[bool]) -> list[Any]:
    """The same, said once more."""
    of_live = [[skip for skip, goes_on in zip(layer, live, strict=True) if goes_on] for layer in skips]
    skipped = [sum(layer) for layer in of_live]
    by_all = [int(any(live) and all(layer)) for layer in skips]
    by_some = [int(any(live) and any(layer)) for layer in skips]
    tells = any(active) and sum(live) > 1
    alike = [tells and says and len(set(layer)) == 1 for layer, says in zip(of_live, ruled, strict=True)]
    return [[skipped, by_all, by_some], [sum(alike), sum(ruled) * tells]]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[bool]], list[bool], list[bool], list[bool]]:
    layers, rows = draw(st.integers(1, 9)), draw(st.integers(1, 11))

    def some(number: int) -> list[bool]:
        mixed = st.lists(st.booleans(), min_size=number, max_size=number)
        return draw(mixed | st.sampled_from([[True] * number, [False] * number]))

    return [some(rows) for _ in range(layers)], some(rows), some(rows), some(layers)


@both
@given(step=steps())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_agrees_with_a_count_by_hand(op: Any, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS", 4)  # so that rows are counted in up to three blocks
    skips, *rest = step
    assert counted(op, flags(skips), *rest) == by_hand(skips, *rest)


@both
@pytest.mark.parametrize("live", [[0, 0, 0], [0, 1, 0], [0, 1, 1]])
@pytest.mark.parametrize("active", [[0, 0, 0], [0, 0, 1]])
def test_who_is_live_and_past_the_warm_up(op: Any, live: list[int], active: list[int]) -> None:
    skips = [[1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 0]]
    per_layer, agreement = counted(op, flags(skips), live, active, [0, 1, 1, 1])
    somebody = int(any(live))
    assert per_layer == [[sum(live), 0, somebody and 1, 0], [somebody, 0, 0, 0], [somebody] * 3 + [0]]
    assert agreement == ([2, 3] if sum(live) > 1 and any(active) else [0, 0])


@both
def test_a_row_of_flags_may_lie_in_a_wider_one(op: Any) -> None:
    wide = torch.ones(4, 16, dtype=torch.bool, device=DEVICE)
    wide[1, :3] = False
    found = counted(op, wide[:-1, :3], [1, 1, 1], [1, 1, 1], [1, 1, 1])
    assert found == [[[3, 0, 3], [1, 0, 1], [1, 0, 1]], [3, 3]]
    assert wide[:, 3:].all()


def test_unfit_tensors_are_refused() -> None:
    fit = {"ruled": flags([1, 1]), **counters(2)}
    skips, row = flags([[1, 0, 1]] * 2), flags([1, 1, 1])
    with pytest.raises(ValueError, match=r"must be \[3\], \[3\], \[2\], \[3, 2\], \[2\]"):
        count(skips, row[:2], row, **fit)
    with pytest.raises(ValueError, match="bool"):
        count(skips, row.int(), row, **fit)
    with pytest.raises(ValueError, match="int64"):
        count(skips, row, row, **fit | {"agreement": torch.zeros(2, device=DEVICE)})
    with pytest.raises(ValueError, match="contiguous"):
        count(flags([[1, 0]] * 3).T, row, row, **fit)
