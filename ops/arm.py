"""The rule `cosine` between two layers: which rows skip the next FFN, from the sums of this one.

    cos = <h, h + f> / (|h| |h + f|)         (arXiv 2404.03865, algorithm 1)

What a row may still skip is one number, `left`: 0 while its cosine is watched, then the skips it
has left; -1 once they are used up, until the token ends, for nothing re-arms; -2 where the row is
nobody's. The region of
layers is not known here: outside it the op is not called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.core.batch_rule import BATCH_RULES, judged_together
from skipcal.ops.lang import jit, padded, runs_kernels, tl

WATCHING, SPENT, NOBODYS = 0, -1, -2  # a flag of `skipcal.ops` less one: may skip, may not, nobody's
UNLIMITED = 2**30  # `max_skips=None`, and more than any model has layers
_TINY = torch.finfo(torch.float32).tiny


def arm(
    sums: Tensor,
    left: Tensor,
    skip: Tensor,
    skip_next: Tensor,
    *,
    live: Tensor,
    threshold: Tensor,
    limit: Tensor,
    batch_rule: str = "rows",
) -> None:
    """Write `left` [rows] int32 and `skip_next` [rows] bool, from sums [parts, 3, rows] of skipcal.ops.ffn.

    skip:      [rows] bool or int8, rows that skipped this FFN; `skip_next` is of the same kind. live: [rows]
               bool, rows whose text goes on.
    threshold: float32, limit: int32, the skips of an armed row; both [1], or both by row [rows]. They are
               read on the device.
    batch_rule: "rows": each row by its cosine; "all": when those of all live rows reach the
               threshold; "mean": when their mean does.
    """
    if not runs_kernels(sums):
        reference(
            sums, left, skip, skip_next, live=live, threshold=threshold, limit=limit, batch_rule=batch_rule
        )
        return
    parts, _, rows = sums.shape
    _arm[(1,)](
        sums, left, skip.view(torch.int8), skip_next.view(torch.int8), live.view(torch.int8),
        threshold, limit, rows,
        PARTS=parts, PARTS_PADDED=padded(parts), ROWS_PADDED=padded(rows),
        EACH=int(len(threshold) > 1), BATCH_RULE=BATCH_RULES.index(batch_rule), TINY=_TINY, num_warps=4,
    )  # fmt: skip


def reference(
    sums: Tensor,
    left: Tensor,
    skip: Tensor,
    skip_next: Tensor,
    *,
    live: Tensor,
    threshold: Tensor,
    limit: Tensor,
    batch_rule: str = "rows",
) -> None:
    """The same in torch."""
    hh, ho, oo = sums.sum(0)
    cosine = (ho / (hh.sqrt() * oo.sqrt()).clamp_min(_TINY)).clamp(-1.0, 1.0)
    arming = (left == WATCHING) & (judged_together(cosine, live, batch_rule) >= threshold)
    skipped = skip > 0
    counted = torch.where(skipped, left - 1, torch.where(arming, limit, left))
    left.copy_(torch.where(skipped & (counted == 0), SPENT, counted))
    skip_next.copy_(torch.where(left == NOBODYS, -1, left > 0))


@jit(varying=("rows",), unaligned=("skip_ptr", "next_ptr", "live_ptr"))
def _arm(
    sums_ptr, left_ptr, skip_ptr, next_ptr, live_ptr, threshold_ptr, limit_ptr, rows,
    PARTS: tl.constexpr, PARTS_PADDED: tl.constexpr, ROWS_PADDED: tl.constexpr,
    EACH: tl.constexpr, BATCH_RULE: tl.constexpr, TINY: tl.constexpr,
):  # fmt: skip
    r = tl.arange(0, ROWS_PADDED)
    there = r < rows
    p = tl.arange(0, PARTS_PADDED)
    left = tl.load(left_ptr + r, mask=there, other=-1)
    watched = left == 0  # the sums of other rows mean nothing
    inside = (p[:, None] < PARTS) & watched[None, :]
    where = sums_ptr + p[:, None] * (3 * rows) + r[None, :]
    hh = tl.sum(tl.load(where, mask=inside, other=0.0), axis=0)
    ho = tl.sum(tl.load(where + rows, mask=inside, other=0.0), axis=0)
    oo = tl.sum(tl.load(where + 2 * rows, mask=inside, other=0.0), axis=0)
    cosine = ho / tl.maximum(tl.sqrt(hh) * tl.sqrt(oo), TINY)
    cosine = tl.minimum(tl.maximum(cosine, -1.0), 1.0)
    live = (tl.load(live_ptr + r, mask=there, other=0) != 0) & there
    if BATCH_RULE == 1:  # all reach the threshold where the smallest does
        cosine = tl.where(there, tl.min(tl.where(live & watched, cosine, 1.0), axis=0), -1.0)
    if BATCH_RULE == 2:
        mean = tl.sum(tl.where(live, cosine, 0.0), axis=0) / tl.sum(live.to(tl.float32), axis=0)
        cosine = tl.where(there, mean, -1.0)
    saturated = cosine >= tl.load(threshold_ptr + r * EACH, mask=there, other=0.0)
    limit = tl.load(limit_ptr + r * EACH, mask=there, other=0)
    skipped = tl.load(skip_ptr + r, mask=there, other=0) > 0
    arming = watched & saturated
    new = tl.where(skipped, left - 1, tl.where(arming, limit, left))
    new = tl.where(skipped & (new == 0), -1, new)
    tl.store(left_ptr + r, new, mask=there)
    tl.store(next_ptr + r, tl.where(new < -1, -1, new > 0).to(tl.int8), mask=there)
