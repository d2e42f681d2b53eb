"""Surrogates: what a skipped FFN block is replaced by, a low-rank linear map of the stream's direction.

A pre-norm FFN sees its input only after a norm, which keeps the direction of the residual stream
and drops its length. So a surrogate is given the direction too,

    u = sqrt(hidden) * h / ||h||        (an RMSNorm without weights)
    s_i(u) = up_i (down_i u) + bias_i   (rank r: 2 r hidden + hidden weights)

and stands in for the whole block: norm, FFN, and what may come after. Nothing of the block is
read for a token that skips it, whatever the family of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class LowRank:
    """One layer's map. down: [rank, hidden], up: [hidden, rank], bias: [hidden]."""

    down: Tensor
    up: Tensor
    bias: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """s(u), [tokens, hidden], of directions u [tokens, hidden]."""
        return F.linear(F.linear(u, self.down), self.up, self.bias)

    @property
    def weight_bytes(self) -> int:
        """Bytes that a token reads where the map runs."""
        return sum(t.numel() * t.element_size() for t in (self.down, self.up, self.bias))

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same map elsewhere, or in another precision."""
        return LowRank(*(t.to(device, dtype) for t in (self.down, self.up, self.bias)))


@dataclass(frozen=True)
class Surrogates:
    """A surrogate for some layers of a model; a skipped FFN of any other layer adds nothing."""

    maps: Mapping[int, LowRank]

    def __call__(self, layer: int, h: Tensor) -> Tensor | None:
        """What stands in for f, [tokens, hidden] in h's dtype; None where the layer has no surrogate."""
        found = self.maps.get(layer)
        return None if found is None else found(direction(h).to(found.down.dtype)).to(h.dtype)

    def weight_bytes(self, layer: int) -> int:
        """Bytes that a token reads instead of the FFN's."""
        found = self.maps.get(layer)
        return 0 if found is None else found.weight_bytes

    def on(self, devices: Mapping[int, torch.device], dtype: torch.dtype) -> Surrogates:
        """The maps where their layers are."""
        return Surrogates({i: m.to(devices[i], dtype) for i, m in self.maps.items()})


def direction(h: Tensor) -> Tensor:
    """sqrt(hidden) * h / ||h||, in float32: [..., hidden]. A zero vector stays zero."""
    stream = h.float()
    norm = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).clamp_min(_TINY)
    u: Tensor = stream / norm * math.sqrt(h.shape[-1])  # the other order overflows at a zero vector
    return u
