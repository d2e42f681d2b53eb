"""What arms the rows of a batch: each its own cosine, or, as an option, all of them together.

A block's weights are saved only where every row skips it. Rows that decide together always do, but
then a token's skips depend on its neighbours: not the paper's method, and never the default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

BATCH_RULES = ("rows", "all", "mean")


def judged_together(cosine: Tensor, live: Tensor | None, batch_rule: str) -> Tensor:
    """The cosine [rows] by which each row is judged.

    live: [rows] bool, rows whose text goes on; None: all. batch_rule: "rows": each row's own; "all":
    the smallest of the live rows'; "mean": their mean.
    """
    if batch_rule == "rows":
        return cosine
    counts = cosine.new_ones(cosine.shape) if live is None else live.to(cosine.dtype)
    if batch_rule == "all":
        return cosine.masked_fill(counts == 0, 1.0).min().expand_as(cosine)
    return (cosine.masked_fill(counts == 0, 0.0).sum() / counts.sum()).expand_as(cosine)
