"""low_rank: adds a surrogate to the stream of the rows that skip an FFN, and touches no other row.

    h += up (down u) + bias,   u = sqrt(hidden) * h / ||h||        where skip           (ours)

Of several maps (core.surrogates.RoutedLowRank) each row reads the `up` and `bias` of its own.

It adds in place, for the stream of a row that skips is the block's result but for s: a returned s
would be zeros for the other rows, written and read again by an add that runs whether or not anybody
skips. Two launches, since all of down u is needed before any of up (down u). Both read the flags
first: when no row skips, no weight is read, and nothing is written.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.core.surrogates import direction
from skipcal.ops.lang import jit, padded, runs_kernels, tl

_TINY = torch.finfo(torch.float32).tiny
# At rank 64 and hidden 4096 these make 128 programs of either kernel, as many as a large GPU has
# SMs; not yet tuned on a device.
_RANKS = 4  # rows of down a program reads
_CHUNK = 512  # elements of each of them
_TILE = 2048  # elements of up a program reads
_WARPS = 4


def low_rank(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    skip: Tensor,
    *,
    route_bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> None:
    """Add the surrogate to the rows of h that skip, in place; the others stay as they are, bit for bit.

    h: [batch, hidden], the stream that enters the FFN block (in a row that skips also what leaves it).
    down: [rank, hidden], up: [hidden, rank], bias: [hidden], contiguous, any float dtypes. skip:
    [batch], bool or integer, a row skips where it is > 0. With route_bias [maps]: down [rank + maps, hidden],
    up [maps, hidden, rank], bias [maps, hidden]. onto: [batch, hidden], contiguous, in h's dtype: what s is
    added to instead of h itself. All on h's device; no host sync. Sums are float32, and s is rounded to h's
    dtype before it is added, as a layer does with an FFN's output.
    ValueError: shapes or strides other than these.
    """
    _check(h, down, up, bias, skip, route_bias)
    if not runs_kernels(h):
        reference(h, down, up, bias, skip, route_bias=route_bias, onto=onto)
        return
    y = h if onto is None else onto
    batch, hidden = h.shape
    rows, rank = len(down), up.shape[-1]
    routes = rows - rank
    chunks = -(-hidden // _CHUNK)
    flags = skip.view(torch.uint8) if skip.dtype == torch.bool else skip
    dots = torch.empty(batch, chunks, rows, dtype=torch.float32, device=h.device)
    squares = torch.empty(batch, chunks, dtype=torch.float32, device=h.device)
    shape = {"BATCH_P": padded(batch), "HIDDEN": hidden, "ROWS": rows}
    _down[(-(-rows // _RANKS), chunks)](
        h, down, flags, dots, squares, h.stride(0), batch,
        **shape, RANKS=_RANKS, CHUNK=_CHUNK, num_warps=_WARPS,
    )  # fmt: skip
    block = max(1, _TILE // padded(rank))
    _up[(-(-hidden // block),)](
        y, up, bias, bias if route_bias is None else route_bias, flags, dots, squares, y.stride(0), batch,
        **shape, RANK=rank, RANK_P=padded(rank), ROUTES=routes, ROUTES_P=padded(max(routes, 1)),
        CHUNKS=chunks, CHUNKS_P=padded(chunks), BLOCK=block, TINY=_TINY, num_warps=_WARPS,
    )  # fmt: skip


def reference(
    h: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    skip: Tensor,
    *,
    route_bias: Tensor | None = None,
    onto: Tensor | None = None,
) -> None:
    """The same in torch."""
    rank = up.shape[-1]
    both = direction(h) @ down.float().T
    if route_bias is None:
        s = both @ up.float().T + bias.float()
    else:
        chosen = (both[:, rank:] + route_bias.float()).argmax(-1)
        own_up, own_bias = up.index_select(0, chosen).float(), bias.index_select(0, chosen).float()
        s = (own_up @ both[:, :rank, None])[:, :, 0] + own_bias
    y = h if onto is None else onto
    y.copy_(torch.where((skip > 0)[:, None], y + s.to(h.dtype), y))


def _check(
    h: Tensor, down: Tensor, up: Tensor, bias: Tensor, skip: Tensor, route_bias: Tensor | None
) -> None:
    batch, hidden = h.shape
    rank, maps = up.shape[-1], [] if route_bias is None else [len(route_bias)]
    weights = [down, up, bias, skip, *([] if route_bias is None else [route_bias])]
    expected = [[rank + sum(maps), hidden], [*maps, hidden, rank], [*maps, hidden], [batch], maps]
    found = [list(t.shape) for t in weights]
    if found != expected[: len(found)] or not rank:
        raise ValueError(
            f"low_rank: for hidden {hidden}, batch {batch}, rank {rank} (not 0) down, up, bias, skip, "
            f"route_bias must be {expected}, not {found}"
        )
    if h.stride(1) != 1 or not all(t.is_contiguous() for t in weights):
        raise ValueError("low_rank: weights and flags must be contiguous, and h along hidden")


@jit(varying=("batch",), unaligned=("skip_ptr",))
def _down(
    h_ptr: tl.tensor, down_ptr: tl.tensor, skip_ptr: tl.tensor, dots_ptr: tl.tensor, squares_ptr: tl.tensor,
    h_stride: int, batch: int, BATCH_P: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr,
    RANKS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """dots[b, chunk, r] = down[r] . h[b] over one chunk of hidden, for RANKS rows r of down.

    And squares[b, chunk] = h[b] . h[b] over that chunk: the length of h is divided out by `_up`.
    """
    rows = tl.arange(0, BATCH_P)
    if tl.max(tl.load(skip_ptr + rows, mask=rows < batch, other=0), axis=0) <= 0:
        return
    chunk = tl.program_id(1)
    r = tl.program_id(0) * RANKS + tl.arange(0, RANKS)
    n = chunk * CHUNK + tl.arange(0, CHUNK)
    tile = (r < ROWS)[:, None] & (n < HIDDEN)[None, :]
    down = tl.load(down_ptr + r[:, None] * HIDDEN + n[None, :], mask=tile, other=0.0).to(tl.float32)
    for b in range(batch):
        if tl.load(skip_ptr + b) > 0:
            h = tl.load(h_ptr + b * h_stride + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
            dots = tl.sum(down * h[None, :], axis=1)
            tl.store(dots_ptr + (b * tl.num_programs(1) + chunk) * ROWS + r, dots, mask=r < ROWS)
            if tl.program_id(0) == 0:
                tl.store(squares_ptr + b * tl.num_programs(1) + chunk, tl.sum(h * h, axis=0))


@jit(varying=("batch",), unaligned=("skip_ptr",))
def _up(
    h_ptr: tl.tensor, up_ptr: tl.tensor, bias_ptr: tl.tensor, route_bias_ptr: tl.tensor, skip_ptr: tl.tensor,
    dots_ptr: tl.tensor, squares_ptr: tl.tensor, h_stride: int, batch: int, BATCH_P: tl.constexpr,
    HIDDEN: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, RANK_P: tl.constexpr, ROUTES: tl.constexpr,
    ROUTES_P: tl.constexpr, CHUNKS: tl.constexpr, CHUNKS_P: tl.constexpr, BLOCK: tl.constexpr,
    TINY: tl.constexpr,
) -> None:  # fmt: skip
    """h[b, n] += up[n] . (down u[b]) + bias[n] for BLOCK elements n of each row b that skips.

    Of several maps the one is read whose row of the route has the largest product with u[b].
    """
    rows = tl.arange(0, BATCH_P)
    if tl.max(tl.load(skip_ptr + rows, mask=rows < batch, other=0), axis=0) <= 0:
        return
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK_P)
    c = tl.arange(0, CHUNKS_P)
    tile = (n < HIDDEN)[:, None] & (r < RANK)[None, :]
    if ROUTES == 0:  # all rows read the same
        up = tl.load(up_ptr + n[:, None] * RANK + r[None, :], mask=tile, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
    parts = (c < CHUNKS)[:, None] & (r < RANK)[None, :]
    for b in range(batch):
        if tl.load(skip_ptr + b) > 0:
            squares = tl.load(squares_ptr + b * CHUNKS + c, mask=c < CHUNKS, other=0.0)
            norm = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), TINY)
            places = (b * CHUNKS + c)[:, None] * ROWS
            dots = tl.sum(tl.load(dots_ptr + places + r[None, :], mask=parts, other=0.0), axis=0)
            # By the norm first: sqrt(hidden) over it overflows where it was clamped.
            down_u = dots / norm * tl.sqrt(HIDDEN * 1.0)
            if ROUTES > 0:
                k = tl.arange(0, ROUTES_P)
                some = (c < CHUNKS)[:, None] & (k < ROUTES)[None, :]
                routes = tl.sum(tl.load(dots_ptr + places + RANK + k[None, :], mask=some, other=0.0), axis=0)
                offsets = tl.load(route_bias_ptr + k, mask=k < ROUTES, other=-float("inf")).to(tl.float32)
                chosen = tl.argmax(routes / norm * tl.sqrt(HIDDEN * 1.0) + offsets, axis=0)
                own = up_ptr + chosen * HIDDEN * RANK + n[:, None] * RANK + r[None, :]
                up = tl.load(own, mask=tile, other=0.0).to(tl.float32)
                bias = tl.load(bias_ptr + chosen * HIDDEN + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
            s = tl.sum(up * down_u[None, :], axis=1) + bias
            h_block = h_ptr + b * h_stride + n
            h = tl.load(h_block, mask=n < HIDDEN, other=0.0)
            tl.store(h_block, h.to(tl.float32) + s.to(h.dtype).to(tl.float32), mask=n < HIDDEN)
