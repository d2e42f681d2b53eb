"""rotary_cache: turns queries and keys by their token's position, and writes keys and values to the cache.

    z = x * cos + turn(x) * sin,   turn(x) = (-second half, first half)   of the first `rotary` elements

or, as in GLM and ERNIE, turn(x) = (-x1, x0, -x3, x2, ...). One launch: a program a row and head. Where heads
have RMSNorms of their own, they come first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipcal.ops.lang import jit, padded, runs_kernels, tl
from skipcal.ops.rms_norm import reference as rms_norm

_WARPS = 1  # a head of 128 is four elements a thread


@dataclass(frozen=True)
class HeadNorms:
    """RMSNorms of each query's and each key's head: weights [head_dim], contiguous."""

    q: Tensor
    k: Tensor
    eps: float


def rotary_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    norms: HeadNorms | None = None,
    pairs: bool = False,
) -> Tensor:
    """Turned queries [batch, heads, head_dim]; keys and values go to `place` of their caches.

    qkv: [batch, (heads + 2 kv_heads) * head_dim], contiguous: queries, keys, values. cos, sin: [batch or 1,
    rotary], as transformers makes them. place: [1] int64 on the device. keys, values: [batch, kv_heads,
    slots, head_dim]. All of one dtype; rounded where transformers rounds. pairs: elements that stand side by
    side turn together, the pair n by the n-th of cos and sin; else the n-th of each half does.
    ValueError: shapes or strides other than these.
    """
    heads = _check(qkv, cos, sin, place, keys, values)
    if not runs_kernels(qkv):
        return reference(qkv, cos, sin, place, keys, values, norms=norms, pairs=pairs)
    batch, kv_heads, _, head_dim = keys.shape
    q = qkv.new_empty(batch, heads, head_dim)
    of_rows = 0 if len(cos) == 1 else cos.stride(0)
    _rotary_cache[(batch, heads + 2 * kv_heads)](
        qkv, cos, sin, place, keys, values, q, qkv if norms is None else norms.q,
        qkv if norms is None else norms.k, 0.0 if norms is None else norms.eps,
        of_rows, *keys.stride()[:3], *values.stride()[:3],
        HEADS=heads, KV_HEADS=kv_heads, HEAD_DIM=head_dim, DIM_P=padded(head_dim), ROTARY=cos.shape[1],
        HAS_NORMS=norms is not None, PAIRS=pairs, num_warps=_WARPS,
    )  # fmt: skip
    return q


def reference(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    place: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    norms: HeadNorms | None = None,
    pairs: bool = False,
) -> Tensor:
    """The same in torch."""
    batch, kv_heads, _, head_dim = keys.shape
    each = qkv.view(batch, -1, head_dim)
    q, k, v = each.split([each.shape[1] - 2 * kv_heads, kv_heads, kv_heads], dim=1)
    if norms is not None:
        q, k = rms_norm(q, norms.q, norms.eps), rms_norm(k, norms.k, norms.eps)
    keys.index_copy_(2, place, _turned(k, cos, sin, pairs)[:, :, None])
    values.index_copy_(2, place, v[:, :, None])
    return _turned(q, cos, sin, pairs)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, pairs: bool) -> Tensor:
    """x: [batch, heads, head_dim]."""
    rotary = cos.shape[1]
    turning, rest = x[..., :rotary], x[..., rotary:]
    if pairs:
        cos, sin = (t[:, : rotary // 2].repeat_interleave(2, dim=-1) for t in (cos, sin))
        other = torch.stack([-turning[..., 1::2], turning[..., ::2]], dim=-1).flatten(-2)
    else:
        first, second = turning.chunk(2, dim=-1)
        other = torch.cat([-second, first], dim=-1)
    turned = turning * cos[:, None] + other * sin[:, None]
    return torch.cat([turned, rest], dim=-1)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, place: Tensor, keys: Tensor, values: Tensor) -> int:
    batch, kv_heads, _, head_dim = keys.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    if keys.shape != values.shape or qkv.shape != (batch, (heads + 2 * kv_heads) * head_dim) or heads < 1:
        raise ValueError(
            f"rotary_cache: qkv {list(qkv.shape)}, keys {list(keys.shape)}, values {list(values.shape)} "
            "must be [batch, (heads + 2 kv_heads) * head_dim] and twice [batch, kv_heads, slots, head_dim]"
        )
    rotary = cos.shape[-1]
    if cos.shape != sin.shape or len(cos) not in (1, batch) or rotary % 2 or rotary > head_dim:
        raise ValueError(
            f"rotary_cache: cos {list(cos.shape)} and sin {list(sin.shape)} must be [{batch} or 1, rotary], "
            f"an even number up to {head_dim}"
        )
    if place.shape != (1,) or place.dtype != torch.int64:
        raise ValueError("rotary_cache: place must be [1] int64, on the device")
    if {t.dtype for t in (cos, sin, keys, values)} != {qkv.dtype}:
        raise ValueError(f"rotary_cache: all must be {qkv.dtype}, as qkv is")
    if not qkv.is_contiguous() or any(t.stride(-1) != 1 for t in (cos, sin, keys, values)):
        raise ValueError("rotary_cache: qkv must be contiguous, and the last axis of the other tensors")
    if cos.stride(0) != sin.stride(0):
        raise ValueError("rotary_cache: cos and sin must have the same strides")
    return heads


@jit(unaligned=("place_ptr",))
def _rotary_cache(
    qkv_ptr: tl.tensor, cos_ptr: tl.tensor, sin_ptr: tl.tensor, place_ptr: tl.tensor, k_ptr: tl.tensor,
    v_ptr: tl.tensor, q_ptr: tl.tensor, q_norm_ptr: tl.tensor, k_norm_ptr: tl.tensor, eps: float,
    of_rows: int, k_batch: int, k_head: int, k_slot: int, v_batch: int, v_head: int, v_slot: int,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr,
    ROTARY: tl.constexpr, HAS_NORMS: tl.constexpr, PAIRS: tl.constexpr,
) -> None:  # fmt: skip
    dtype = q_ptr.dtype.element_ty
    batch = tl.program_id(0).to(tl.int64)  # offsets into a long cache pass 2**31
    head = tl.program_id(1)
    d = tl.arange(0, DIM_P)
    inside = d < HEAD_DIM
    given_ptr = qkv_ptr + (batch * (HEADS + 2 * KV_HEADS) + head) * HEAD_DIM
    place = tl.load(place_ptr)
    given = tl.load(given_ptr + d, mask=inside, other=0.0)
    if head >= HEADS + KV_HEADS:
        to = v_ptr + batch * v_batch + (head - HEADS - KV_HEADS) * v_head + place * v_slot
        tl.store(to + d, given, mask=inside)
    else:
        turns = d < ROTARY
        if PAIRS:
            low = d % 2 == 0
            other, angle = d ^ 1, d // 2
        else:
            low = d < ROTARY // 2
            other, angle = tl.where(low, d + ROTARY // 2, d - ROTARY // 2), d
        x = given.to(tl.float32)
        y = tl.load(given_ptr + other, mask=turns, other=0.0).to(tl.float32)
        if HAS_NORMS:
            norm_ptr = tl.where(head < HEADS, q_norm_ptr, k_norm_ptr)
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + eps)
            x_weight = tl.load(norm_ptr + d, mask=inside, other=0.0).to(tl.float32)
            y_weight = tl.load(norm_ptr + other, mask=turns, other=0.0).to(tl.float32)
            x = ((x * scale).to(dtype).to(tl.float32) * x_weight).to(dtype).to(tl.float32)
            y = ((y * scale).to(dtype).to(tl.float32) * y_weight).to(dtype).to(tl.float32)
        cos = tl.load(cos_ptr + batch * of_rows + angle, mask=turns, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + batch * of_rows + angle, mask=turns, other=0.0).to(tl.float32)
        z = (x * cos).to(dtype).to(tl.float32) + (tl.where(low, -y, y) * sin).to(dtype).to(tl.float32)
        if head < HEADS:
            tl.store(q_ptr + (batch * HEADS + head) * HEAD_DIM + d, z.to(dtype), mask=inside)
        else:
            to = k_ptr + batch * k_batch + (head - HEADS) * k_head + place * k_slot
            tl.store(to + d, z.to(dtype), mask=inside)
