"""Attention over a cache that is partly in use: against float64, and against what it must not read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import Reads
from torch import Tensor

from skipcal.ops import decode_attention as module
from skipcal.ops.decode_attention import decode_attention, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAN = float("nan")
both = pytest.mark.parametrize("op", [decode_attention, reference])


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks a split and several splits, at sizes that the interpreter gets through.

    It multiplies the bit patterns of bfloat16 in tl.dot (Triton 3.6), so there groups go the way of
    single queries. On a GPU nothing is changed but the block, the smallest that tl.dot takes.
    """
    monkeypatch.setattr(module, "_BLOCK", 16 if ON_GPU else 8)
    monkeypatch.setattr(module, "_PROGRAMS", 6)


def cache(
    batch: int, heads: int, kv_heads: int, slots: int, head_dim: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(batch, heads, head_dim, device=DEVICE)
    k, v = torch.randn(2, batch, kv_heads, slots, head_dim, device=DEVICE)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def used(length: int) -> Tensor:
    return torch.tensor(length, device=DEVICE)


def exact(
    q: Tensor, k: Tensor, v: Tensor, length: int, valid: Tensor | None = None, scale: float = 0.3
) -> tuple[Tensor, Tensor]:
    """The result in float64, row by row and head by head; and the same of |v|, for the tolerance."""
    out, size = torch.zeros(2, *q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        slots = torch.arange(length) if valid is None else valid[b, :length].nonzero()[:, 0].cpu()
        if len(slots):
            for head in range(q.shape[1]):
                keys, values = (t[b, head // group, slots.to(q.device)].double() for t in (k, v))
                weights = (keys @ q[b, head].double() * scale).softmax(0)
                out[b, head], size[b, head] = weights @ values, weights @ values.abs()
    return out, size


def assert_exact(got: Tensor, want: tuple[Tensor, Tensor], *, scores: float = 0.0) -> None:
    """Within the rounding of the result, and of the softmax's weights where tensor cores take them.

    Half a unit each; all of it in bfloat16, where the interpreter cuts instead of rounding. float32's
    own error, seen: 1e-6. Large scores are rounded too, by a unit of theirs, and so are their exponentials.
    """
    out, size = want
    unit = torch.finfo(got.dtype).eps * (1.0 if got.dtype == torch.bfloat16 else 0.5)
    unit_of_scores = torch.finfo(torch.float32).eps * scores
    assert ((got.double() - out).abs() <= unit * (out.abs() + size) + unit_of_scores * size + 4e-6).all()


SHAPES = [  # batch, heads, kv_heads, slots, head_dim, length
    (1, 2, 2, 16, 64, 16),
    (2, 1, 1, 37, 72, 30),
    (1, 6, 2, 23, 80, 17),
    (2, 4, 1, 50, 96, 49),
    (1, 7, 1, 9, 128, 3),
    (5, 1, 1, 33, 20, 33),
    (2, 6, 2, 33, 8, 30),  # heads shorter than a matrix product on tensor cores takes
]


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(
    op: Any, shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16 and not ON_GPU:
        monkeypatch.setattr(module, "_CUDA_CORE_GROUP", 8)
    batch, heads, kv_heads, slots, head_dim, length = shape
    q, k, v = cache(batch, heads, kv_heads, slots, head_dim, dtype)
    out = op(q, k, v, used(length), scale=0.3)
    assert out.dtype == dtype and out.shape == q.shape
    assert_exact(out, exact(q, k, v, length))


@both
@pytest.mark.parametrize("length", [1, 8, 9, 16, 17, 32, 39, 40])
@pytest.mark.parametrize("heads", [2, 6])
def test_each_length_from_one_slot_to_all(op: Any, length: int, heads: int) -> None:
    q, k, v = cache(1, heads, 2, 40, 16)
    assert_exact(op(q, k, v, used(length), scale=0.3), exact(q, k, v, length))


@both
def test_a_longer_length_than_the_cache_means_all_of_it(op: Any) -> None:
    q, k, v = cache(1, 2, 1, 10, 16)
    assert_exact(op(q, k, v, used(12), scale=0.3), exact(q, k, v, 10))


@both
@pytest.mark.parametrize("heads", [1, 3])
def test_left_padding_is_left_out_row_by_row(op: Any, heads: int) -> None:
    q, k, v = cache(4, heads, 1, 40, 16)
    padding = torch.tensor([0, 7, 29, 30], device=DEVICE)  # the last row has one valid slot
    valid = torch.arange(40, device=DEVICE)[None] >= padding[:, None]
    out = op(q, k, v, used(31), valid=valid, scale=0.3)
    assert_exact(out, exact(q, k, v, 31, valid))
    torch.testing.assert_close(out[3], v[3, :, 30].expand(heads, -1))


@both
def test_valid_slots_need_not_be_contiguous(op: Any) -> None:
    q, k, v = cache(3, 2, 1, 40, 16)
    valid = torch.rand(3, 40, device=DEVICE) < 0.3
    assert_exact(op(q, k, v, used(33), valid=valid, scale=0.3), exact(q, k, v, 33, valid))


@both
@pytest.mark.parametrize("heads", [1, 3])
def test_a_row_without_a_slot_gets_zeros(op: Any, heads: int) -> None:
    q, k, v = cache(2, heads, 1, 20, 16)
    valid = torch.ones(2, 20, dtype=torch.bool, device=DEVICE)
    valid[1] = False
    out = op(q, k, v, used(11), valid=valid, scale=0.3)
    assert_exact(out, exact(q, k, v, 11, valid))
    assert not out[1].any()
    assert not op(q, k, v, used(0), scale=0.3).any()


@both
@pytest.mark.parametrize("heads", [1, 3])
def test_nan_in_slots_that_are_not_in_use_does_not_leak(op: Any, heads: int) -> None:
    q, k, v = cache(2, heads, 1, 40, 72)
    valid = torch.arange(40, device=DEVICE)[None] >= torch.tensor([[3], [18]], device=DEVICE)
    want = exact(q, k, v, 22, valid)
    unused = ~valid | (torch.arange(40, device=DEVICE) >= 22)[None]
    k.masked_fill_(unused[:, None, :, None], NAN)
    v.masked_fill_(unused[:, None, :, None], NAN)
    assert_exact(op(q, k, v, used(22), valid=valid, scale=0.3), want)


@both
@pytest.mark.parametrize("heads", [1, 3])
def test_large_scores_do_not_overflow(op: Any, heads: int) -> None:
    q, k, v = cache(1, heads, 1, 30, 16)
    k[:, :, 5] += 400 * q.mean(1, keepdim=True) / q.mean(1).square().mean()
    out = op(q, k, v, used(21), scale=1.0)
    largest = float(torch.einsum("bhd,bgsd->bhs", q, k[:, :, :21]).abs().max())
    assert_exact(out, exact(q, k, v, 21, scale=1.0), scores=largest)
    k[:, :, :] -= 800 * q.mean(1, keepdim=True) / q.mean(1).square().mean()
    assert op(q, k, v, used(21), scale=1.0).isfinite().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2)])
@pytest.mark.parametrize("length", [1, 12, 40])
def test_each_slot_in_use_is_read_once_and_no_other(
    length: int, heads: int, kv_heads: int, reads: Reads
) -> None:
    q, k, v = cache(2, heads, kv_heads, 40, 8)
    valid = torch.arange(40)[None] >= torch.tensor([[0], [4]])
    decode_attention(q, k, v, used(length), valid=valid, scale=0.3)
    want = (valid & (torch.arange(40) < length)).long()[:, None, :, None].expand_as(k)
    assert torch.equal(reads.of(k), want)
    assert torch.equal(reads.of(v), want)


def test_a_program_without_slots_reads_nothing_but_the_length(reads: Reads) -> None:
    q, k, v = cache(1, 1, 1, 40, 8)  # 8 splits, and slots for 2 of a block each
    decode_attention(q, k, v, used(12), scale=0.3)
    assert (reads.of(q) == 2).all()


def test_the_slots_in_use_are_dealt_out_evenly(reads: Reads) -> None:
    """However short the context is: else a long cache would leave it to a few programs."""
    q, k, v = cache(1, 2, 2, 400, 8)  # 4 splits a head, and three blocks
    decode_attention(q, k, v, used(24), scale=0.3)
    assert (reads.of(q) == 3).all()


@pytest.mark.parametrize("heads", [2, 4])
def test_stale_scratch_does_not_leak(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*shape: int, **kwargs: Any) -> Tensor:
        return torch.full(shape, NAN, **kwargs)

    monkeypatch.setattr(torch, "empty", stale)
    q, k, v = cache(1, heads, 2, 40, 16)
    assert_exact(decode_attention(q, k, v, used(6), scale=0.3), exact(q, k, v, 6))


def test_a_view_of_projected_heads_and_of_a_larger_cache_will_do() -> None:
    q = torch.randn(2, 1, 4, 16, device=DEVICE).transpose(1, 2)[:, :, 0]
    k, v = torch.randn(2, 2, 30, 2, 16, device=DEVICE).transpose(2, 3)[:, :, :, 3:]
    out = decode_attention(q, k, v, used(21), scale=0.3)
    assert_exact(out, exact(q, k, v, 21))


def test_unfit_tensors_are_refused() -> None:
    q, k, v = cache(1, 4, 2, 10, 16)
    for message, change in {
        "heads a multiple": {"q": q[:, :3]},
        "twice": {"v": v[:, :, 1:]},
        "not alike": {"k": k.half()},
        "0-d int64": {"length": used(3)[None]},
        "valid must be bool": {"valid": torch.ones(1, 10, device=DEVICE)},
        "contiguous": {"v": v.transpose(2, 3).contiguous().transpose(2, 3)},
    }.items():
        given: dict[str, Any] = {"q": q, "k": k, "v": v, "length": used(3), "scale": 1.0} | change
        with pytest.raises(ValueError, match=message):
            decode_attention(**given)
