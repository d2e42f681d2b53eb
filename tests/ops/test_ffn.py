"""The FFN kernels against their reference, by Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import Reads, small_blocks

from skipcal.ops import ffn as module
from skipcal.ops.ffn import FFNWeights, ffn, reference
from skipcal.ops.settings import Settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A norm of the error, relative to that of f: float32 sums in another order, or a and f rounded once.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)


def made(rows: int, hidden: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, FFNWeights]:
    def some(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape) * scale).to(DEVICE, dtype)

    h = some(rows, hidden)
    norm = (1 + 0.1 * torch.randn(hidden)).to(DEVICE, dtype)
    narrow, wide = hidden**-0.5, width**-0.5
    gate, up = (some(width, hidden, scale=narrow) for _ in range(2))
    return h, FFNWeights(norm, 1e-5, gate, up, some(hidden, width, scale=wide))


def flags(*skip: int) -> torch.Tensor:
    return torch.tensor(skip, dtype=torch.bool, device=DEVICE)


def cosine(sums: torch.Tensor) -> torch.Tensor:
    hh, ho, oo = sums.sum(0)
    found: torch.Tensor = ho / (hh * oo).sqrt()
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("skip", [[0], [1], [0, 0, 0], [0, 1, 0, 1, 1], [1, 1, 1]])
@pytest.mark.parametrize(("hidden", "width"), [(64, 128), (72, 100)])  # 72 and 100: no block divides them
def test_kernels_equal_the_reference(dtype: torch.dtype, skip: list[int], hidden: int, width: int) -> None:
    if DEVICE == "cpu" and len(skip) > 1 and dtype == torch.bfloat16:
        pytest.skip("Triton 3.6's interpreter multiplies bfloat16 matrices by their bit patterns")
    h, weights = made(len(skip), hidden, width, dtype)
    expected, sums = reference(h, flags(*skip), weights)
    f, partial = ffn(h, flags(*skip), weights)
    runs = ~flags(*skip)
    error = (f - expected).float().norm() / expected.float().norm().clamp_min(1e-9)
    assert error < TOLERANCE[dtype]
    assert (f[~runs] == 0).all()
    assert f.dtype == dtype
    torch.testing.assert_close(cosine(partial)[runs], cosine(sums)[runs], atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("op", [ffn, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("skip", [[0], [1], [0, 1, 0]])
def test_f_may_be_added_to_the_stream(op: Any, dtype: torch.dtype, skip: list[int]) -> None:
    """Rounded before and after, as a layer adds it; a row that skips is passed on."""
    h, weights = made(len(skip), 72, 100, dtype)
    f, sums = op(h, flags(*skip), weights)
    added, same = op(h, flags(*skip), weights, adds=True)
    assert torch.equal(added, h + f)
    assert torch.equal(same[:, :, ~flags(*skip)], sums[:, :, ~flags(*skip)])


@pytest.mark.parametrize("rows", [1, 3])
def test_no_weight_reaches_rows_that_all_skip(rows: int) -> None:
    """Weights of NaN would show in whatever reads them."""
    h, weights = made(rows, 64, 128, torch.float32)
    for tensor in vars(weights).values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(float("nan"))
    f, _ = ffn(h, flags(*[1] * rows), weights)
    assert (f == 0).all()


def test_a_row_that_skips_does_not_leak_what_lies_in_its_place() -> None:
    """The input and the activation of a row that skips are never written: new memory is NaN here."""
    h, weights = made(3, 64, 128, torch.float16)
    h[1] = float("inf")
    torch.use_deterministic_algorithms(True)  # which fills what `empty` returns
    try:
        f, sums = ffn(h, flags(0, 1, 0), weights)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.isfinite(f).all()
    assert (f[1] == 0).all()
    assert torch.isfinite(sums[:, :, [0, 2]]).all()


def normed(h: torch.Tensor, weights: FFNWeights) -> torch.Tensor:
    x = h.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.float()  # type: ignore[union-attr]
    return x.to(h.dtype)


@pytest.mark.parametrize("op", [ffn, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("skip", [[0], [1], [0, 1, 0, -1]])
def test_what_the_norm_made_may_be_given(op: Any, dtype: torch.dtype, skip: list[int]) -> None:
    """A row that skips is not read, nor one that is nobody's; the norm of the weights is not asked."""
    h, weights = made(len(skip), 72, 100, dtype)
    rows = torch.tensor(skip, dtype=torch.int8, device=DEVICE)
    expected, sums = reference(h, rows, weights)
    x, runs = normed(h, weights), rows == 0
    x[~runs] = torch.nan
    f, partial = op(h, rows, replace(weights, norm=None, eps=torch.nan), x=x)
    error = (f - expected).float().norm() / expected.float().norm().clamp_min(1e-9)
    assert error < TOLERANCE[dtype]
    assert (f[~runs] == 0).all()
    torch.testing.assert_close(cosine(partial)[runs], cosine(sums)[runs], atol=TOLERANCE[dtype], rtol=0.0)


@pytest.mark.parametrize("rows", [1, 3])
def test_no_weight_is_read_for_padding(rows: int, reads: Reads) -> None:
    h, weights = made(rows, 64, 128, torch.float32)
    nobodys = torch.tensor([-1] * rows, dtype=torch.int8, device=DEVICE)
    f, _ = ffn(h, nobodys, weights, x=h)
    assert (f == 0).all()
    assert all(int(reads.of(t).sum()) == 0 for t in (weights.gate, weights.up, weights.down, h))


@pytest.mark.parametrize("rows", [1, 3])
def test_settings_may_be_given(rows: int) -> None:
    h, weights = made(rows, 64, 128, torch.float32)
    settings = {"gate_up": Settings(32, 32, 4, 2), "down": Settings(32, 128, 4, 2)}
    f, sums = ffn(h, flags(*[0] * rows), weights, settings=settings)
    assert sums.shape == (2, 3, rows)  # 64 by 32; else 16 rows a block
    torch.testing.assert_close(f, reference(h, flags(*[0] * rows), weights)[0], atol=1e-5, rtol=1e-5)


def test_without_kernels_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "runs_kernels", lambda h: False)
    h, weights = made(2, 64, 128, torch.float32)
    f, sums = ffn(h, flags(0, 1), weights)
    assert sums.shape == (1, 3, 2)
    assert torch.equal(f, reference(h, flags(0, 1), weights)[0])
