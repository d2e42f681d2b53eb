"""The gate's decision against float64, at the edges of float32, and with one threshold a row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from skipcal.ops.gate import gate, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Scores are of order 1, sums of up to 4096 terms. Seen: 9e-7 at most, of kernel and reference.
ATOL = 4e-6


def scalar(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def probe(hidden: int, **given: Tensor) -> dict[str, Any]:
    weight = torch.randn(hidden, device=DEVICE) / hidden**0.5
    return {
        "weight": weight,
        "log_norm_weight": scalar(0.3),
        "bias": scalar(-0.2),
        "threshold": scalar(0.0),
    } | given


def exact(h: Tensor, weight: Tensor, log_norm_weight: Tensor, bias: Tensor, threshold: Tensor) -> Tensor:
    """The score in float64."""
    stream = h.double()
    norm = stream.norm(dim=-1)
    along = stream @ weight.double() / norm * math.sqrt(h.shape[-1])
    score: Tensor = along + log_norm_weight.double() * norm.log() + bias.double()
    return score


@pytest.mark.parametrize("op", [gate, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("batch", "hidden"), [(1, 64), (3, 77), (16, 576), (2, 4096), (5, 1)])
def test_agrees_with_float64(op: Any, batch: int, hidden: int, dtype: torch.dtype) -> None:
    h = (torch.randn(batch, hidden, device=DEVICE) * 3 + 0.5).to(dtype)
    model = probe(hidden)
    want = exact(h, **model)
    model["threshold"] = want.median().float() + 1e-3  # every row's score is further away than ATOL
    assert (want - model["threshold"]).abs().min() > ATOL
    skip, score = op(h, **model)
    torch.testing.assert_close(score.double(), want, atol=ATOL, rtol=0)
    assert skip.dtype == torch.bool
    assert skip.tolist() == (want < model["threshold"]).tolist()
    assert skip.sum() > 0 and (batch == 1 or skip.sum() < batch)


@pytest.mark.parametrize("op", [gate, reference])
def test_a_zero_vector_has_no_direction_and_the_smallest_norm(op: Any) -> None:
    h = torch.zeros(2, 96, device=DEVICE)
    h[1] = 1.0
    model = probe(96)
    score = op(h, **model).score
    log_tiny = math.log(torch.finfo(torch.float32).tiny)
    torch.testing.assert_close(score[0].item(), 0.3 * log_tiny - 0.2, rtol=1e-6, atol=0)
    torch.testing.assert_close(score[1].double(), exact(h[1:], **model)[0], atol=ATOL, rtol=0)


@pytest.mark.parametrize("op", [gate, reference])
def test_a_score_that_is_not_a_number_does_not_skip(op: Any) -> None:
    h = torch.randn(3, 40, device=DEVICE)
    h[1, 7] = float("nan")
    skip, score = op(h, **probe(40, threshold=scalar(float("inf"))))
    assert score.isnan().tolist() == [False, True, False]
    assert skip.tolist() == [1, 0, 1]


@pytest.mark.parametrize("op", [gate, reference])
def test_the_threshold_itself_does_not_skip(op: Any) -> None:
    h = torch.randn(1, 40, device=DEVICE)
    model = probe(40)
    score = op(h, **model).score[0]
    assert op(h, **model | {"threshold": score}).skip.tolist() == [0]
    above = score.nextafter(scalar(float("inf")))
    assert op(h, **model | {"threshold": above}).skip.tolist() == [1]


@pytest.mark.parametrize("op", [gate, reference])
def test_a_threshold_a_row_keeps_rows_apart_in_their_warm_up(op: Any) -> None:
    h = torch.randn(4, 40, device=DEVICE)
    never, always = -float("inf"), float("inf")
    threshold = torch.tensor([always, never, never, always], device=DEVICE)
    assert op(h, **probe(40, threshold=threshold)).skip.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_rows_that_may_not_skip_do_not(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    h, flags = torch.randn(4, 40, device=DEVICE), torch.ones(3, 4, dtype=torch.bool, device=DEVICE)
    active = torch.tensor([True, False, True, False], device=DEVICE)
    always = probe(40, threshold=scalar(math.inf))
    assert gate(h, **always, active=active, skip=flags[1]).skip.data_ptr() == flags[1].data_ptr()
    assert flags.tolist() == [[True] * 4, active.tolist(), [True] * 4]


@pytest.mark.parametrize("interpreted", ["1", "0"])
def test_rows_that_are_nobodys_stay_so(interpreted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    h = torch.randn(4, 40, device=DEVICE)
    h[3] = math.nan
    active = torch.tensor([1, 0, -1, -1], dtype=torch.int8, device=DEVICE)
    skip = torch.full((4,), 9, dtype=torch.int8, device=DEVICE)
    gate(h, **probe(40, threshold=scalar(math.inf)), active=active, skip=skip)
    assert skip.tolist() == [1, 0, -1, -1]


def test_a_row_may_lie_in_a_wider_buffer() -> None:
    wide = torch.randn(3, 100, device=DEVICE)
    model = probe(60)
    part = wide[:, 20:80]
    assert torch.equal(gate(part, **model).score, gate(part.contiguous(), **model).score)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": torch.zeros(41)}, "weight must be contiguous \\[40\\]"),
        ({"active": torch.zeros(3, dtype=torch.bool)}, "active and skip"),
        ({"skip": torch.zeros(2)}, "active and skip"),
        ({"bias": torch.zeros(1)}, "must be 0-d"),
        ({"threshold": torch.zeros(3)}, "must be 0-d"),
        ({"bias": torch.zeros((), dtype=torch.float64)}, "must be float32"),
    ],
)
def test_unfit_tensors_are_refused(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gate(torch.zeros(2, 40, device=DEVICE), **probe(40) | given)
