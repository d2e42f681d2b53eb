"""Linears side by side against float64, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import small_blocks
from torch import Tensor

from skipcal.ops.project import project, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A norm of the error, relative to that of y: float32 sums in another order, or x and y rounded.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
both = pytest.mark.parametrize("run", [project, reference])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def some(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def exact(h: Tensor, matrices: list[Tensor], *, biases: Any, norm: Any, eps: float, residual: Any) -> Tensor:
    """The same in float64, one matrix after the other."""
    x = h.double()
    if norm is not None:
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * norm.double()
    parts = []
    for place, matrix in enumerate(matrices):
        part = (x[:, None] * matrix.double()).sum(-1)
        parts.append(part if biases is None else part + biases[place].double())
    y = torch.cat(parts, dim=-1)
    return y if residual is None else y + residual.double()


def allowed(dtype: torch.dtype, rows: int) -> None:
    if DEVICE == "cpu" and rows > 1 and dtype == torch.bfloat16:
        pytest.skip("Triton 3.6's interpreter multiplies bfloat16 matrices by their bit patterns")


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("heads", [[40], [24, 8, 8], [64, 64, 64]])  # 24 and 8: no block divides them
@pytest.mark.parametrize("extras", [True, False])
def test_agrees_with_float64(run: Any, dtype: torch.dtype, rows: int, heads: list[int], extras: bool) -> None:
    if run is project:
        allowed(dtype, rows)
    inputs = 40
    matrices = [some(outputs, inputs, dtype=dtype, scale=inputs**-0.5) for outputs in heads]
    given: dict[str, Any] = {"biases": None, "norm": None, "eps": 1e-5, "residual": None}
    if extras:
        given["biases"] = [some(outputs, dtype=dtype) for outputs in heads]
        given["norm"] = 1 + some(inputs, dtype=dtype, scale=0.1)
        given["residual"] = some(rows, sum(heads), dtype=dtype)
    h = some(rows, inputs, dtype=dtype, scale=3.0)
    y, want = run(h, matrices, **given), exact(h, matrices, **given)
    assert (y.dtype, y.shape) == (dtype, want.shape)
    assert (y.double() - want).norm() / want.norm() < TOLERANCE[dtype]


@both
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_added_to_the_residual_is_rounded_first(run: Any, rows: int) -> None:
    """As a linear's result is before a layer adds it: 1 + 2**-11 is half a place beyond 1 in float16."""
    h = torch.ones(rows, 1, dtype=torch.float16, device=DEVICE)
    matrix = torch.tensor([[1.0]], dtype=torch.float16, device=DEVICE)
    bias = torch.tensor([2.0**-11], dtype=torch.float16, device=DEVICE)
    y = run(h, [matrix], biases=[bias], residual=-h)
    assert (y == 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"matrices": [torch.zeros(8, 39)]}, "of 40 columns"),
        ({"matrices": [torch.zeros(8, 40)] * 4}, "up to three"),
        ({"matrices": [torch.zeros(n, 40) for n in (8, 8, 4)]}, "two alike"),
        ({"biases": [torch.zeros(4)]}, "do not fit"),
        ({"residual": torch.zeros(1, 8)}, "residual"),
    ],
)
def test_unfit_tensors_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        project(torch.zeros(2, 40), **{"matrices": [torch.zeros(8, 40)]} | given)
