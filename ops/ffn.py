"""A SwiGLU FFN block of one decode step, which reads no weight when every row skips it.

    x = RMSNorm(h) * norm        a = silu(gate x) * (up x)        f = down a

The kernels are always launched, so that a CUDA graph can hold them. They read the rows' flags
first: where all rows skip they return at once, and f is 0. A row that skips while another runs
gets f = 0 too; the weights are read once for all rows. Where a host has run the norm, x is given.

A single row goes through plain multiply-adds, several through matrix products with the weights as
the left operand. On the way out come the partial sums of <h, h>, <h, h + f> and <h + f, h + f>
in float32, of which skipcal.ops.arm makes the cosine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcal.ops.lang import jit, padded, runs_kernels, tl
from skipcal.ops.settings import Settings, row_class, settings_for

MAX_ROWS = 64  # beyond, an accumulator of one block no longer fits the registers of a block


@dataclass(frozen=True)
class FFNWeights:
    """norm: [hidden]; gate, up: [ffn, hidden]; down: [hidden, ffn]; all contiguous and of one dtype.

    norm: None where the host runs it.
    """

    norm: Tensor | None
    eps: float
    gate: Tensor
    up: Tensor
    down: Tensor


def ffn(
    h: Tensor,
    skip: Tensor,
    weights: FFNWeights,
    *,
    x: Tensor | None = None,
    adds: bool = False,
    settings: Mapping[str, Settings] | None = None,
) -> tuple[Tensor, Tensor]:
    """f [rows, hidden] in h's dtype, and sums [parts, 3, rows] in float32.

    h: [rows, hidden], contiguous. skip: [rows] bool or int8. The sums of a row that skips mean nothing.
    x: [rows, hidden], contiguous, in h's dtype: what the norm makes of h; None: it is made here.
    adds: return h + f instead, which is h in a row that skips.
    settings: of `gate_up` and `down`, in place of those of skipcal.ops.settings; parts are as many as `down`
    has blocks.
    """
    if not runs_kernels(h):
        return reference(h, skip, weights, x=x, adds=adds)
    return _launched(h, skip, weights, x, adds, settings or {})


def reference(
    h: Tensor, skip: Tensor, weights: FFNWeights, *, x: Tensor | None = None, adds: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in torch, rounded where the kernels round: a and f."""
    if x is None:
        assert weights.norm is not None
        x = h.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + weights.eps) * weights.norm.float()
    x = x.float()
    a = F.silu(x @ weights.gate.float().T) * (x @ weights.up.float().T)
    f = (a.to(h.dtype).float() @ weights.down.float().T).to(h.dtype)
    f = f.masked_fill((skip != 0)[:, None], 0.0)
    before, after = h.float(), h.float() + f.float()
    sums = torch.stack([(before * before).sum(-1), (before * after).sum(-1), (after * after).sum(-1)])
    return h + f if adds else f, sums[None]


@jit(unaligned=("skip_ptr",))
def _gate_up_one(
    h_ptr, norm_ptr, gate_ptr, up_ptr, a_ptr, skip_ptr, eps,
    HIDDEN: tl.constexpr, FFN: tl.constexpr, NORMED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """With NORMED, h_ptr is x, and the norm's weights are not read."""
    if tl.load(skip_ptr) == 0:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < FFN
        row = n.to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside_k = k < HIDDEN
            x = tl.load(h_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
            if not NORMED:
                squares += x * x
                x = x * tl.load(norm_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
            inside = inside_n[:, None] & inside_k[None, :]
            w = tl.load(gate_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            v = tl.load(up_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            gate += w.to(tl.float32) * x[None, :]
            up += v.to(tl.float32) * x[None, :]
        g = tl.sum(gate, axis=1)
        u = tl.sum(up, axis=1)
        if not NORMED:
            scale = tl.rsqrt(tl.sum(squares, axis=0) / HIDDEN + eps)  # one scalar, so it can come last
            g *= scale
            u *= scale
        a = g / (1.0 + tl.exp(-g)) * u
        tl.store(a_ptr + n, a.to(a_ptr.dtype.element_ty), mask=inside_n)


@jit(unaligned=("skip_ptr",))
def _down_one(
    a_ptr, down_ptr, h_ptr, y_ptr, sums_ptr, skip_ptr,
    HIDDEN: tl.constexpr, FFN: tl.constexpr, ADDS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < HIDDEN
    if tl.load(skip_ptr) == 0:
        row = n.to(tl.int64)[:, None] * FFN
        sum_ = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in tl.range(0, FFN, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside_k = k < FFN
            x = tl.load(a_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
            inside = inside_n[:, None] & inside_k[None, :]
            w = tl.load(down_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            sum_ += w.to(tl.float32) * x[None, :]
        f = tl.sum(sum_, axis=1).to(y_ptr.dtype.element_ty).to(tl.float32)
        before = tl.load(h_ptr + n, mask=inside_n, other=0.0).to(tl.float32)
        after = before + tl.where(inside_n, f, 0.0)
        y = after if ADDS else f
        tl.store(y_ptr + n, y.to(y_ptr.dtype.element_ty), mask=inside_n)
        tl.store(sums_ptr + part * 3 + 0, tl.sum(before * before, axis=0))
        tl.store(sums_ptr + part * 3 + 1, tl.sum(before * after, axis=0))
        tl.store(sums_ptr + part * 3 + 2, tl.sum(after * after, axis=0))
    elif ADDS:
        tl.store(y_ptr + n, tl.load(h_ptr + n, mask=inside_n, other=0.0), mask=inside_n)
    else:
        tl.store(y_ptr + n, tl.zeros([BLOCK_N], tl.float32).to(y_ptr.dtype.element_ty), mask=inside_n)


@jit(unaligned=("skip_ptr",))
def _norm_some(
    h_ptr, norm_ptr, x_ptr, skip_ptr, eps,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(skip_ptr + row) == 0:
        k = tl.arange(0, BLOCK)
        inside = k < HIDDEN
        h = tl.load(h_ptr + row * HIDDEN + k, mask=inside, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(h * h, axis=0) / HIDDEN + eps)
        x = h * scale * tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * HIDDEN + k, x.to(x_ptr.dtype.element_ty), mask=inside)


@jit(varying=("rows",), unaligned=("skip_ptr",))
def _gate_up_some(
    x_ptr, gate_ptr, up_ptr, a_ptr, skip_ptr, rows,
    HIDDEN: tl.constexpr, FFN: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, PADDED)
    runs = tl.load(skip_ptr + r, mask=r < rows, other=1) == 0
    if tl.sum(runs.to(tl.int32), axis=0) > 0:
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        inside_n = n < FFN
        row = n.to(tl.int64)[:, None] * HIDDEN
        gate = tl.zeros([BLOCK_N, PADDED], tl.float32)
        up = tl.zeros([BLOCK_N, PADDED], tl.float32)
        for start in tl.range(0, HIDDEN, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside_k = k < HIDDEN
            # the input of a row that skips is whatever an earlier step left there: it is not read
            x = tl.load(
                x_ptr + r[None, :] * HIDDEN + k[:, None], mask=runs[None, :] & inside_k[:, None], other=0.0
            )
            inside = inside_n[:, None] & inside_k[None, :]
            w = tl.load(gate_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            v = tl.load(up_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            gate = tl.dot(w, x, gate, input_precision="ieee")
            up = tl.dot(v, x, up, input_precision="ieee")
        a = gate / (1.0 + tl.exp(-gate)) * up
        tl.store(
            a_ptr + r[None, :] * FFN + n[:, None],
            a.to(a_ptr.dtype.element_ty),
            mask=runs[None, :] & inside_n[:, None],
        )


@jit(varying=("rows",), unaligned=("skip_ptr",))
def _down_some(
    a_ptr, down_ptr, h_ptr, y_ptr, sums_ptr, skip_ptr, rows,
    HIDDEN: tl.constexpr, FFN: tl.constexpr, PADDED: tl.constexpr,
    ADDS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    r = tl.arange(0, PADDED)
    there = r < rows
    runs = tl.load(skip_ptr + r, mask=there, other=1) == 0
    n = part * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = n < HIDDEN
    where = r[None, :] * HIDDEN + n[:, None]
    f = tl.zeros([BLOCK_N, PADDED], tl.float32)
    if tl.sum(runs.to(tl.int32), axis=0) > 0:
        row = n.to(tl.int64)[:, None] * FFN
        for start in tl.range(0, FFN, BLOCK_K, num_stages=STAGES):
            k = start + tl.arange(0, BLOCK_K)
            inside_k = k < FFN
            x = tl.load(
                a_ptr + r[None, :] * FFN + k[:, None], mask=runs[None, :] & inside_k[:, None], other=0.0
            )
            inside = inside_n[:, None] & inside_k[None, :]
            w = tl.load(down_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
            f = tl.dot(w, x, f, input_precision="ieee")
        rounded = f.to(y_ptr.dtype.element_ty).to(tl.float32)
        running = runs[None, :] & inside_n[:, None]
        before = tl.load(h_ptr + where, mask=running, other=0.0).to(tl.float32)
        after = before + tl.where(running, rounded, 0.0)
        sums = sums_ptr + part * 3 * rows + r
        tl.store(sums, tl.sum(before * before, axis=0), mask=there)
        tl.store(sums + rows, tl.sum(before * after, axis=0), mask=there)
        tl.store(sums + 2 * rows, tl.sum(after * after, axis=0), mask=there)
    wanted = there[None, :] & inside_n[:, None]
    y = tl.where(runs[None, :], f, 0.0)
    if ADDS:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(h_ptr + where, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=wanted)


def _launched(
    h: Tensor,
    skip: Tensor,
    weights: FFNWeights,
    x: Tensor | None,
    adds: bool,
    settings: Mapping[str, Settings],
) -> tuple[Tensor, Tensor]:
    rows, (width, hidden) = len(h), weights.gate.shape
    flags = skip.view(torch.int8)
    a, y = h.new_empty(rows, width), torch.empty_like(h)
    n, k, warps, stages = settings_for("gate_up", h, width, given=settings.get("gate_up"))
    grid = (-(-width // n),)
    shape = {"HIDDEN": hidden, "FFN": width, "BLOCK_N": n, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
    if rows == 1:
        _gate_up_one[grid](
            h if x is None else x, weights.gate if weights.norm is None else weights.norm,
            weights.gate, weights.up, a, flags, weights.eps, NORMED=x is not None, **shape,
        )  # fmt: skip
    else:
        if x is None:
            x = torch.empty_like(h)
            _norm_some[(rows,)](
                h, weights.norm, x, flags, weights.eps, HIDDEN=hidden, BLOCK=padded(hidden), num_warps=4
            )
        _gate_up_some[grid](x, weights.gate, weights.up, a, flags, rows, PADDED=row_class(rows), **shape)
    n, k, warps, stages = settings_for("down", a, hidden, given=settings.get("down"))
    parts = -(-hidden // n)
    sums = h.new_empty(parts, 3, rows, dtype=torch.float32)
    shape |= {"BLOCK_N": n, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
    if rows == 1:
        _down_one[(parts,)](a, weights.down, h, y, sums, flags, ADDS=adds, **shape)
    else:
        _down_some[(parts,)](
            a, weights.down, h, y, sums, flags, rows, PADDED=row_class(rows), ADDS=adds, **shape
        )
    return y, sums
