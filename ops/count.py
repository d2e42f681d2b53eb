"""count: what one decode step skipped, added to the session's counters in one launch.

For each layer the blocks that live rows skipped, and whether every row, and any row, did. For the
batch the decisions on which all its live rows agreed: a layer's do where none of them skips, or all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.ops.lang import jit, padded, runs_kernels, tl

_ROWS = 32  # rows that are counted at a time: at 128 layers 32 flags a thread
_WARPS = 4


def count(
    skips: Tensor, live: Tensor, active: Tensor, *, ruled: Tensor, per_layer: Tensor, agreement: Tensor
) -> None:
    """Add one step to `per_layer` and `agreement`, in place.

    skips: [layers, batch] bool, of any row stride. live: [batch] bool, rows whose text goes on. active:
    [batch] bool, rows past their warm-up. ruled: [layers] bool, layers in which a rule has a say.
    per_layer: [3, layers] int64, contiguous: blocks skipped by live rows, steps in which every row
    skipped, and in which any row did. agreement: [2] int64: decisions alike, and decisions, of steps
    with two live rows and one past its warm-up. Without a live row nothing is counted. No host sync.
    ValueError: shapes, dtypes or strides other than these.
    """
    _check(skips, live, active, ruled, per_layer, agreement)
    if not runs_kernels(skips):
        reference(skips, live, active, ruled=ruled, per_layer=per_layer, agreement=agreement)
        return
    layers, rows = skips.shape
    flags = (flag.view(torch.int8) for flag in (skips, live, active, ruled))
    _count[(1,)](
        *flags, per_layer, agreement, skips.stride(0), rows,
        LAYERS=layers, LAYERS_P=padded(layers), BLOCK=min(_ROWS, padded(rows)), num_warps=_WARPS,
    )  # fmt: skip


def reference(
    skips: Tensor, live: Tensor, active: Tensor, *, ruled: Tensor, per_layer: Tensor, agreement: Tensor
) -> None:
    """The same in torch."""
    skipped, by_all, by_some = per_layer.unbind()
    skipped.add_((skips & live).sum(1))
    somebody = live.any()  # else the step was launched before the host knew that all is over
    by_all.add_(skips.all(1) & somebody)
    by_some.add_(skips.any(1) & somebody)
    alike = (skips | ~live).all(1) | ~(skips & live).any(1)
    tells = active.any() & (live.sum() > 1)  # one row always agrees with itself
    agreement[0].add_((alike & ruled & tells).sum())
    agreement[1].add_(ruled.sum() * tells)


def _check(
    skips: Tensor, live: Tensor, active: Tensor, ruled: Tensor, per_layer: Tensor, agreement: Tensor
) -> None:
    layers, rows = skips.shape
    flags, counters = (skips, live, active, ruled), (per_layer, agreement)
    found = [list(t.shape) for t in (*flags[1:], *counters)]
    if found != [[rows], [rows], [layers], [3, layers], [2]]:
        raise ValueError(
            "count: live, active, ruled, per_layer, agreement must be "
            f"[{rows}], [{rows}], [{layers}], [3, {layers}], [2], not {found}"
        )
    dtypes = [t.dtype for t in (*flags, *counters)]
    if dtypes != [torch.bool] * 4 + [torch.int64] * 2:
        raise ValueError(f"count: flags must be bool and counters int64, not {dtypes}")
    if skips.stride(1) != 1 or not all(t.is_contiguous() for t in (*flags[1:], *counters)):
        raise ValueError("count: flags and counters must be contiguous, and skips along its rows")


@jit(varying=("rows",), unaligned=("skips_ptr", "live_ptr", "active_ptr", "ruled_ptr"))
def _count(
    skips_ptr: tl.tensor, live_ptr: tl.tensor, active_ptr: tl.tensor, ruled_ptr: tl.tensor,
    per_layer_ptr: tl.tensor, agreement_ptr: tl.tensor, skips_stride: int, rows: int,
    LAYERS: tl.constexpr, LAYERS_P: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program, so that nothing is added twice and in no other order."""
    layer = tl.arange(0, LAYERS_P)
    known = layer < LAYERS
    rows_that_skip = tl.zeros([LAYERS_P], tl.int32)
    live_that_skip = tl.zeros([LAYERS_P], tl.int32)
    lives = tl.zeros([BLOCK], tl.int32)
    actives = tl.zeros([BLOCK], tl.int32)
    for start in range(0, rows, BLOCK):
        r = start + tl.arange(0, BLOCK)
        live = tl.load(live_ptr + r, mask=r < rows, other=0).to(tl.int32)
        flags = known[:, None] & (r < rows)[None, :]
        skips = tl.load(skips_ptr + layer[:, None] * skips_stride + r[None, :], mask=flags, other=0).to(
            tl.int32
        )
        rows_that_skip += tl.sum(skips, axis=1)
        live_that_skip += tl.sum(skips * live[None, :], axis=1)
        lives += live
        actives += tl.load(active_ptr + r, mask=r < rows, other=0).to(tl.int32)
    live_rows = tl.sum(lives, axis=0)
    somebody = live_rows > 0  # else the step was launched before the host knew that all is over
    _add(per_layer_ptr + layer, live_that_skip, known)
    _add(per_layer_ptr + LAYERS + layer, (rows_that_skip == rows) & somebody, known)
    _add(per_layer_ptr + 2 * LAYERS + layer, (rows_that_skip > 0) & somebody, known)
    tells = (live_rows > 1) & (tl.sum(actives, axis=0) > 0)  # one row always agrees with itself
    asked = (tl.load(ruled_ptr + layer, mask=known, other=0) != 0) & tells
    alike = asked & ((live_that_skip == 0) | (live_that_skip == live_rows))
    _add(agreement_ptr, tl.sum(alike.to(tl.int32), axis=0), True)
    _add(agreement_ptr + 1, tl.sum(asked.to(tl.int32), axis=0), True)


@jit
def _add(counter_ptr: tl.tensor, by: tl.tensor, mask: tl.tensor) -> None:
    """Add `by` to int64 counters."""
    tl.store(counter_ptr, tl.load(counter_ptr, mask=mask, other=0) + by.to(tl.int64), mask=mask)
