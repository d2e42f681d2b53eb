"""Turned queries and keys, and what the cache holds then, against a loop in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from skipcal.ops.rotary_cache import HeadNorms, reference, rotary_cache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Of the largest value, about 4: each of two products and their sum is rounded, and with a norm x twice.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 8e-3, torch.bfloat16: 6e-2}
SLOTS, PLACE = 7, 4
both = pytest.mark.parametrize("op", [rotary_cache, reference])


def some(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype)


def turned(
    x: Tensor, cos: Tensor, sin: Tensor, norm: Tensor | None, eps: float, *, side_by_side: bool
) -> Tensor:
    """One head [head_dim] in float64, pair by pair."""
    x, cos, sin = x.double(), cos.double(), sin.double()
    if norm is not None:
        x = x / (x.square().mean() + eps).sqrt() * norm.double()
    z, half = x.clone(), len(cos) // 2
    for n in range(half):
        i, j = (2 * n, 2 * n + 1) if side_by_side else (n, n + half)
        z[i] = x[i] * cos[n] - x[j] * sin[n]
        z[j] = x[j] * cos[n] + x[i] * sin[n]
    return z


@both
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary"), [(3, 1, 24, 24), (4, 2, 8, 8), (2, 2, 16, 6), (2, 1, 8, 0)]
)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_agrees_with_pairs_in_float64(
    op: Any,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rotary: int,
    batch: int,
    normed: bool,
    pairs: bool,
) -> None:
    angles = torch.rand(batch, rotary // 2, device=DEVICE) * 6
    cos, sin = (torch.cat([t, t], dim=-1).to(dtype) for t in (angles.cos(), angles.sin()))
    qkv = some(batch, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    keys, values = (some(batch, kv_heads, SLOTS, head_dim, dtype=dtype) for _ in range(2))
    before = keys.clone(), values.clone()
    norms = None
    if normed:
        q_norm, k_norm = (1 + 0.1 * some(head_dim, dtype=dtype) for _ in range(2))
        norms = HeadNorms(q_norm, k_norm, 1e-5)
    place = torch.tensor([PLACE], device=DEVICE)
    q = op(qkv, cos, sin, place, keys, values, norms=norms, pairs=pairs)
    each = qkv.view(batch, -1, head_dim)
    for row in range(batch):
        for head in range(heads + kv_heads):
            norm = None if norms is None else norms.q if head < heads else norms.k
            want = turned(each[row, head], cos[row], sin[row], norm, 1e-5, side_by_side=pairs)
            found = q[row, head] if head < heads else keys[row, head - heads, PLACE]
            assert (found.double() - want).abs().max() < TOLERANCE[dtype]
    assert torch.equal(values[:, :, PLACE], each[:, heads + kv_heads :])
    others = [place for place in range(SLOTS) if place != PLACE]
    for cache, was in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, others], was[:, :, others])


@both
def test_one_position_may_stand_for_all_rows(op: Any) -> None:
    qkv = some(3, 4 * 8, dtype=torch.float32)
    angles = torch.rand(1, 8, device=DEVICE)
    place = torch.tensor([0], device=DEVICE)
    caches = [torch.zeros(3, 1, 2, 8, device=DEVICE) for _ in range(4)]
    one = op(qkv, angles, angles, place, *caches[:2])
    each = op(qkv, angles.repeat(3, 1), angles.repeat(3, 1), place, *caches[2:])
    assert torch.equal(one, each) and torch.equal(caches[0], caches[2])


@both
def test_the_cache_may_be_a_part_of_a_larger_one(op: Any) -> None:
    wide = torch.zeros(2, 2, 9, 8, device=DEVICE)
    qkv = some(2, 4 * 8, dtype=torch.float32)
    angles = torch.ones(2, 8, device=DEVICE)
    op(qkv, angles, angles, torch.tensor([3], device=DEVICE), wide[:, :1, 2:], wide[:, 1:, 2:])
    assert torch.equal(wide[:, 1, 5], qkv[:, 24:])
    assert (wide[:, :, [0, 1, 2, 3, 4, 6, 7, 8]] == 0).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"qkv": torch.zeros(2, 15)}, "head_dim"),
        ({"cos": torch.zeros(2, 3)}, "cos"),
        ({"cos": torch.zeros(2, 7), "sin": torch.zeros(2, 7)}, "an even number"),
        ({"place": torch.tensor(1)}, "place"),
        ({"keys": torch.zeros(2, 1, 3, 8).half()}, "float32"),
        ({"qkv": torch.zeros(32, 2).T}, "contiguous"),
    ],
)
def test_unfit_tensors_are_refused(given: dict[str, Tensor], message: str) -> None:
    fit: dict[str, Any] = {
        "qkv": torch.zeros(2, 4 * 8),
        "cos": torch.zeros(2, 8),
        "sin": torch.zeros(2, 8),
        "place": torch.tensor([1]),
        "keys": torch.zeros(2, 1, 3, 8),
        "values": torch.zeros(2, 1, 3, 8),
    }
    with pytest.raises(ValueError, match=message):
        rotary_cache(**fit | given)
