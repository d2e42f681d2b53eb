"""The surrogate's op against float64; rows that do not skip, and weights nobody needs, stay untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from interpreted import Reads
from torch import Tensor

from skipcal.core.surrogates import LowRank, RoutedLowRank, Surrogates
from skipcal.ops import low_rank as module
from skipcal.ops.low_rank import low_rank, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs and chunks at sizes that the interpreter gets through."""
    monkeypatch.setattr(module, "_CHUNK", 32)
    monkeypatch.setattr(module, "_TILE", 256)


def weights(rank: int, hidden: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    down = torch.randn(rank, hidden, device=DEVICE) / hidden**0.5
    up = torch.randn(hidden, rank, device=DEVICE) / rank**0.5
    return down.to(dtype), up.to(dtype), torch.randn(hidden, device=DEVICE).to(dtype)


def flags(*skip: int) -> Tensor:
    return torch.tensor(skip, dtype=torch.int32, device=DEVICE)


def exact(h: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """h + s in float64."""
    stream = h.double()
    u = stream / stream.norm(dim=-1, keepdim=True) * math.sqrt(h.shape[-1])
    want: Tensor = stream + u @ down.double().T @ up.double().T + bias.double()
    return want


def rounding(values: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding to dtype may take: half a unit; all of it in bfloat16, where the interpreter cuts."""
    return values.abs() * torch.finfo(dtype).eps * (1.0 if dtype == torch.bfloat16 else 0.5)


@pytest.mark.parametrize("op", [low_rank, reference])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [
        *((dtype, dtype) for dtype in DTYPES),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
)
@pytest.mark.parametrize(("rank", "hidden"), [(4, 64), (5, 77), (1, 33), (17, 70)])
def test_agrees_with_float64(
    op: Any, rank: int, hidden: int, dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    h = (torch.randn(3, hidden, device=DEVICE) * 3).to(dtype)
    before = h.clone()
    model = weights(rank, hidden, weight_dtype)
    op(h, *model, flags(1, 0, 1))
    want = exact(before, *model)
    # s is rounded to h's dtype, the sum once more. float32's own error, seen: 1e-6.
    bound = rounding(want - before.double(), dtype) + rounding(want, dtype) + 4e-6
    assert ((h.double() - want).abs() <= bound)[[0, 2]].all()
    assert torch.equal(h[1], before[1])


@pytest.mark.parametrize(
    ("skip", "kind"),
    [
        ([1], torch.int32),
        ([0], torch.bool),
        ([1] * 16, torch.int32),
        ([0, 1] * 8, torch.bool),
        ([1, 0, 0, 1, 1], torch.int64),
        ([0, 0, 3], torch.int8),
    ],
)
def test_each_row_goes_by_its_own_flag(skip: list[int], kind: torch.dtype) -> None:
    h = torch.randn(len(skip), 50, device=DEVICE)
    before = h.clone()
    model = weights(3, 50)
    low_rank(h, *model, flags(*skip).to(kind))
    want = torch.where(flags(*skip)[:, None] > 0, exact(before, *model).float(), before)
    torch.testing.assert_close(h, want, atol=4e-6, rtol=0)
    ran = flags(*skip) == 0
    assert torch.equal(h[ran], before[ran])


def test_a_flag_below_zero_does_not_skip() -> None:
    h = torch.randn(2, 50, device=DEVICE)
    before = h.clone()
    low_rank(h, *weights(3, 50), flags(-1, -1))
    assert torch.equal(h, before)


@pytest.mark.parametrize("op", [low_rank, reference])
def test_no_weight_is_felt_when_no_row_skips(op: Any) -> None:
    h = torch.randn(2, 50, device=DEVICE)
    before = h.clone()
    op(h, *(torch.full_like(w, NAN) for w in weights(3, 50)), flags(0, 0))
    assert torch.equal(h, before)


@pytest.mark.parametrize(("skip", "times"), [((0, 0, 0), 0), ((0, 1, 0), 1), ((1, 1, 1), 1)])
def test_weights_are_read_once_if_a_row_skips_and_else_never(
    skip: tuple[int, ...], times: int, reads: Reads
) -> None:
    h = torch.randn(3, 50)
    model = weights(5, 50)
    low_rank(h, *model, flags(*skip))
    assert all((reads.of(w) == times).all() for w in model)
    assert ((reads.of(h) > 0) == (flags(*skip) > 0)[:, None]).all()


@pytest.mark.parametrize("op", [low_rank, reference])
def test_rows_do_not_leak_into_each_other(op: Any) -> None:
    h = torch.randn(3, 50, device=DEVICE)
    alone = h[1:2].clone()
    h[0] = NAN
    h[2] *= 1e6
    model = weights(3, 50)
    op(h, *model, flags(0, 1, 1))
    op(alone, *model, flags(1))
    torch.testing.assert_close(h[1:2], alone)  # a matrix product sums in an order of its own
    assert h[0].isnan().all()


@pytest.mark.parametrize("op", [low_rank, reference])
def test_a_zero_vector_gets_the_bias(op: Any) -> None:
    h = torch.zeros(1, 50, device=DEVICE)
    down, up, bias = weights(3, 50)
    op(h, down, up, bias, flags(1))
    assert torch.equal(h[0], bias)


@pytest.mark.parametrize("op", [low_rank, reference])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_what_the_eager_engine_adds(op: Any, dtype: torch.dtype) -> None:
    h = torch.randn(2, 64, device=DEVICE).to(dtype)
    model = LowRank(*weights(4, 64))
    s = Surrogates({0: model})(0, h)
    assert s is not None
    want = h + s
    op(h, model.down, model.up, model.bias, flags(1, 1))
    # The engine rounds u, down u and s to the weights' dtype, the op only s: each by up to a unit of
    # terms of order 1, of which there are four. Seen: 8 units.
    torch.testing.assert_close(h, want, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_row_may_lie_in_a_wider_buffer() -> None:
    wide = torch.randn(3, 100, device=DEVICE)
    before = wide.clone()
    model = weights(3, 60)
    low_rank(wide[:, 20:80], *model, flags(1, 1, 0))
    packed = before[:, 20:80].contiguous()
    low_rank(packed, *model, flags(1, 1, 0))
    assert torch.equal(wide[:, 20:80], packed)
    assert torch.equal(wide[:, :20], before[:, :20]) and torch.equal(wide[:, 80:], before[:, 80:])


def routed(rank: int, hidden: int, maps: int, dtype: torch.dtype = torch.float32) -> RoutedLowRank:
    """Maps that tokens are spread over, biases and all."""
    down = torch.randn(rank + maps, hidden, device=DEVICE) / hidden**0.5
    up = torch.randn(maps, hidden, rank, device=DEVICE) / rank**0.5
    bias, route_bias = torch.randn(maps, hidden, device=DEVICE), 0.1 * torch.randn(maps, device=DEVICE)
    return RoutedLowRank(*(t.to(dtype) for t in (down, up, bias, route_bias)))


def exact_map(h: Tensor, model: RoutedLowRank) -> int:
    """The map of one token h [hidden], in float64."""
    u = h.double() / h.double().norm() * math.sqrt(len(h))
    rank = model.up.shape[-1]
    return int((model.down[rank:].double() @ u + model.route_bias.double()).argmax())


@pytest.mark.parametrize("op", [low_rank, reference])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "hidden", "maps"), [(4, 64, 8), (5, 77, 3), (1, 33, 2), (17, 70, 5)])
def test_of_several_maps_each_row_gets_its_own(
    op: Any, rank: int, hidden: int, maps: int, dtype: torch.dtype
) -> None:
    h = (torch.randn(12, hidden, device=DEVICE) * 3).to(dtype)
    before, model = h.clone(), routed(rank, hidden, maps)
    op(h, model.down, model.up, model.bias, flags(*[1, 1, 0] * 4), route_bias=model.route_bias)
    chosen = [exact_map(row, model) for row in before]
    want = torch.stack(
        [
            exact(row[None], model.down[:rank], model.up[k], model.bias[k])[0]
            for row, k in zip(before, chosen, strict=True)
        ]
    )
    bound = rounding(want - before.double(), dtype) + rounding(want, dtype) + 4e-6
    ran = torch.arange(12) % 3 == 2
    assert len(set(chosen)) > 1
    assert ((h.double() - want).abs() <= bound)[~ran].all()
    assert torch.equal(h[ran], before[ran])


def test_maps_that_no_row_has_are_not_read(reads: Reads) -> None:
    h, model = torch.randn(3, 50), routed(4, 50, 6)
    chosen = [exact_map(row, model) for row in h]
    low_rank(h, model.down, model.up, model.bias, flags(1, 0, 1), route_bias=model.route_bias)
    times = torch.tensor([sum(k == chosen[row] for row in (0, 2)) for k in range(6)])
    assert (reads.of(model.up) == times[:, None, None]).all()
    assert (reads.of(model.bias) == times[:, None]).all()
    assert (reads.of(model.down) == 1).all()


def test_unfit_tensors_are_refused() -> None:
    down, up, bias = weights(3, 50)
    several = routed(3, 50, 4)
    with pytest.raises(ValueError, match=r"\[\[7, 50\], \[4, 50, 3\]"):
        low_rank(
            torch.zeros(1, 50, device=DEVICE),
            down,
            several.up,
            several.bias,
            flags(1),
            route_bias=torch.zeros(4),
        )
    with pytest.raises(ValueError, match=r"\[\[50, 50\], \[50, 50\], \[50\], \[1\]"):
        low_rank(torch.zeros(1, 50, device=DEVICE), down, up.T, bias, flags(1))
    with pytest.raises(ValueError, match="contiguous"):
        low_rank(torch.zeros(1, 50, device=DEVICE), down, up.T.contiguous().T, bias, flags(1))


@pytest.mark.parametrize("op", [low_rank, reference])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_surrogate_may_be_added_elsewhere(op: Any, dtype: torch.dtype) -> None:
    """To what is in place of f, then: h stays, and so do rows that run or are nobody's."""
    h = (torch.randn(4, 70, device=DEVICE) * 3).to(dtype)
    f, before, model = torch.randn_like(h), h.clone(), weights(5, 70)
    skip = torch.tensor([1, 0, -1, 1], dtype=torch.int8, device=DEVICE)
    f[[0, 3]] = 0.0
    others = f[[1, 2]].clone()
    op(h, *model, skip, onto=f)
    s = exact(before, *model) - before.double()
    assert ((f.double() - s).abs() <= rounding(s, dtype) + 4e-6)[[0, 3]].all()
    assert torch.equal(f[[1, 2]], others)
    assert torch.equal(h, before)
