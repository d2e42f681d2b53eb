"""What a pass on the device adds where an FFN is skipped."""

from __future__ import annotations

from torch import Tensor

from skipcal.core.surrogates import Surrogates
from skipcal.ops.low_rank import low_rank


def add_surrogate(
    surrogates: Surrogates, layer: int, h: Tensor, skip: Tensor, *, onto: Tensor | None = None
) -> None:
    """Add the layer's surrogate of the stream h [rows, hidden] in rows that skip, in place.

    onto: what it is added to; None: h itself. Where a layer adds f to that stream, it is 0 in these rows, so
    that no scale of the layer's meets the surrogate.
    """
    found = surrogates.maps.get(layer)
    if found is not None:
        route_bias = getattr(found, "route_bias", None)  # of several maps
        low_rank(h, found.down, found.up, found.bias, skip, route_bias=route_bias, onto=onto)
