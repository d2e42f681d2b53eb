"""decode_attention: one query a head against a static key-value cache that is only partly in use.

    out = softmax(scale * q k^T) v   over the slots below `length`, without those of padding

The cache is longer than the context, and a captured CUDA graph cannot launch fewer programs when the
context is short. So the launch is fixed and the work is not: the slots in use, whose number lies on
the device, are dealt out to the programs, and a program that gets none returns before it reads a key.
The sum over slots is split and put together again as in Flash-Decoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html): each split leaves its normalized result
and the logarithm of its sum of exponentials.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.ops.lang import jit, padded, runs_kernels, tl

# Slots that a program loads at a time: twice as many spill registers at head_dim 128, as ptxas compiles
# it for sm_90. Programs over all rows, heads and splits, about four for each SM of a large GPU; and splits
# of a head, for `_merge_splits` spills at 256. None is tuned on a device yet.
_BLOCK = 32
_PROGRAMS = 512
_MAX_SPLITS = 64
_WARPS = 4
_CUDA_CORE_GROUP = 1  # queries a cache head that are multiplied on CUDA cores; more take tensor cores,
_DOT_SIDE = 16  # which multiply so many at a time, of heads no shorter


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, valid: Tensor | None = None, scale: float
) -> Tensor:
    """Attend with one query a row and head: [batch, heads, head_dim] in q's dtype.

    q: [batch, heads, head_dim]. k, v: [batch, kv_heads, slots, head_dim] in q's dtype; query head i
    reads the cache's head i // (heads / kv_heads). length: 0-d int64 on the device, slots in use, the
    current token's included. valid: [batch, slots] bool, False for left padding. What lies in other
    slots is not read, NaN included; a row without a slot to attend to gets zeros. Any strides, if the
    last axis is contiguous. No host sync: shapes and launches are the same for each length, and a cache
    of more slots compiles nothing anew.
    ValueError: shapes or strides other than these.
    """
    _check(q, k, v, length, valid)
    if not runs_kernels(q):
        return reference(q, k, v, length, valid=valid, scale=scale)
    batch, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    group = heads // kv_heads
    dot = group > _CUDA_CORE_GROUP
    splits = min(_MAX_SPLITS, padded(-(-_PROGRAMS // (batch * kv_heads))))
    part = torch.empty(batch * heads, splits, head_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(batch * heads, splits, dtype=torch.float32, device=q.device)
    out = torch.empty(batch, heads, head_dim, dtype=q.dtype, device=q.device)
    flags = k if valid is None else valid.view(torch.uint8)  # an unused pointer must still be one
    side = _DOT_SIDE if dot else 1
    shared = {"HEAD_DIM": head_dim, "DIM_P": max(side, padded(head_dim)), "SPLITS": splits, "BLOCK": _BLOCK}
    _attend_split[(batch * kv_heads, splits)](
        q, k, v, length, flags, part, lse, scale, slots,
        *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], flags.stride(0),
        KV_HEADS=kv_heads, GROUP=group, ROWS=max(side, padded(group)), DOT=dot,
        HAS_VALID=valid is not None, **shared, num_warps=_WARPS,
    )  # fmt: skip
    _merge_splits[(batch * heads,)](part, lse, length, out, slots, **shared, num_warps=_WARPS)
    return out


def reference(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, valid: Tensor | None = None, scale: float
) -> Tensor:
    """The same in torch, in float32, reading the whole cache."""
    group = q.shape[1] // k.shape[1]
    used = (torch.arange(k.shape[2], device=q.device) < length)[None, None]  # [1, 1, slots]
    if valid is not None:
        used = used & valid[:, None]  # [batch, 1, slots]
    keys, values = (
        torch.where(used[..., None], t.float(), 0.0).repeat_interleave(group, dim=1) for t in (k, v)
    )
    scores = torch.einsum("bhd,bhsd->bhs", q.float(), keys) * scale
    weights = scores.masked_fill(~used, -torch.inf).softmax(-1).masked_fill(~used, 0.0)
    return torch.einsum("bhs,bhsd->bhd", weights, values).to(q.dtype)


def _check(q: Tensor, k: Tensor, v: Tensor, length: Tensor, valid: Tensor | None) -> None:
    batch, heads, head_dim = q.shape
    kv_heads, slots = k.shape[1:3]
    if k.shape != v.shape or k.shape != (batch, kv_heads, slots, head_dim) or heads % kv_heads:
        raise ValueError(
            f"decode_attention: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)} must be "
            "[batch, heads, head_dim] and twice [batch, kv_heads, slots, head_dim], heads a multiple"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"decode_attention: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}, not alike")
    if length.dim() or length.dtype != torch.int64 or length.device != q.device:
        raise ValueError(f"decode_attention: length must be 0-d int64 on {q.device}, so as not to sync")
    if valid is not None and (valid.shape != (batch, slots) or valid.dtype != torch.bool):
        raise ValueError(f"decode_attention: valid must be bool [{batch}, {slots}]")
    if any(t.stride(-1) != 1 for t in (q, k, v, *([] if valid is None else [valid]))):
        raise ValueError("decode_attention: the last axis of each tensor must be contiguous")


@jit
def _slots_of_split(
    length: tl.tensor, slots: int, split: tl.tensor, SPLITS: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tuple:
    """First slot of a split, the slot after its last, and how many splits have any: evenly, in blocks."""
    used = tl.minimum(length, slots).to(tl.int32)
    share = tl.cdiv(tl.cdiv(used, BLOCK), SPLITS) * BLOCK
    return split * share, tl.minimum(used, (split + 1) * share), tl.cdiv(used, tl.maximum(share, 1))


# Strides of k and v stay known as multiples of 16, which they are for any number of slots: else loads
# would be narrow.
@jit(varying=("slots", "valid_batch"))
def _attend_split(
    q_ptr: tl.tensor, k_ptr: tl.tensor, v_ptr: tl.tensor, length_ptr: tl.tensor, valid_ptr: tl.tensor,
    part_ptr: tl.tensor, lse_ptr: tl.tensor, scale: float, slots: int,
    q_batch: int, q_head: int, k_batch: int, k_head: int, k_slot: int,
    v_batch: int, v_head: int, v_slot: int, valid_batch: int,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DOT: tl.constexpr,
    HAS_VALID: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """The queries of one cache head against one split of its slots: a running softmax over blocks."""
    split = tl.program_id(1)
    first, last, _ = _slots_of_split(tl.load(length_ptr), slots, split, SPLITS, BLOCK)
    if first >= last:
        return
    batch = (tl.program_id(0) // KV_HEADS).to(tl.int64)  # offsets into a long cache pass 2**31
    kv_head = tl.program_id(0) % KV_HEADS
    g = tl.arange(0, ROWS)
    d = tl.arange(0, DIM_P)
    heads = kv_head * GROUP + g
    in_q = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + batch * q_batch + heads[:, None] * q_head + d[None, :], mask=in_q, other=0.0)
    k_ptr += batch * k_batch + kv_head * k_head
    v_ptr += batch * v_batch + kv_head * v_head

    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, DIM_P], tl.float32)
    for start in range(first, last, BLOCK):
        n = start + tl.arange(0, BLOCK)
        use = n < last
        if HAS_VALID:
            use &= tl.load(valid_ptr + batch * valid_batch + n, mask=use, other=0) != 0
        tile = use[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(k_ptr + n[:, None].to(tl.int64) * k_slot + d[None, :], mask=tile, other=0.0)
        v = tl.load(v_ptr + n[:, None].to(tl.int64) * v_slot + d[None, :], mask=tile, other=0.0)
        if DOT:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        else:
            scores = tl.sum(q[:, None, :].to(tl.float32) * k[None, :, :].to(tl.float32), axis=2)
        scores = tl.where(use[None, :], scores * scale, float("-inf"))  # [ROWS, BLOCK]
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        # A row that has met no valid slot yet: -inf less -inf would be NaN.
        pivot = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(scores - pivot[:, None])
        decay = tl.exp(top - pivot)
        if DOT:
            add = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        else:
            add = tl.sum(weights[:, :, None] * v[None, :, :].to(tl.float32), axis=1)
        acc = acc * decay[:, None] + add
        total = total * decay + tl.sum(weights, axis=1)
        top = new_top

    row = (batch * KV_HEADS * GROUP + heads) * SPLITS + split
    total = tl.where(total > 0.0, total, 1.0)  # where nothing was valid, acc is 0 and top is -inf
    tl.store(lse_ptr + row, top + tl.log(total), mask=g < GROUP)
    tl.store(part_ptr + row[:, None] * HEAD_DIM + d[None, :], acc / total[:, None], mask=in_q)


@jit(varying=("slots",))
def _merge_splits(
    part_ptr: tl.tensor, lse_ptr: tl.tensor, length_ptr: tl.tensor, out_ptr: tl.tensor, slots: int,
    HEAD_DIM: tl.constexpr, DIM_P: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Mean of the splits' results, weighted by their sums of exponentials; one program a row and head."""
    _, _, splits = _slots_of_split(tl.load(length_ptr), slots, 0, SPLITS, BLOCK)
    row = tl.program_id(0)
    s = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM_P)
    lse = tl.load(lse_ptr + row * SPLITS + s, mask=s < splits, other=float("-inf"))
    top = tl.max(lse, axis=0)
    weights = tl.exp(lse - tl.where(top == float("-inf"), 0.0, top))
    written = (s < splits)[:, None] & (d < HEAD_DIM)[None, :]  # other splits' memory is not even zeros
    part = tl.load(part_ptr + (row * SPLITS + s)[:, None] * HEAD_DIM + d[None, :], mask=written, other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(part * weights[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out_ptr + row * HEAD_DIM + d, out, mask=d < HEAD_DIM)
