"""Surrogates: what a skipped FFN block is replaced by, a low-rank linear map of the stream's direction.

A pre-norm FFN sees its input only after a norm, which keeps the direction of the residual stream
and drops its length. So a surrogate is given the direction too,

    u = sqrt(hidden) * h / ||h||        (an RMSNorm without weights)
    s_i(u) = up_i (down_i u) + bias_i   (rank r: 2 r hidden + hidden weights)

and stands in for the whole block: norm, FFN, and what may come after. Nothing of the block is
read for a token that skips it, whatever the family of the model.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcal.errors import ConfigError

if TYPE_CHECKING:
    from skipcal.core.host import BlockWeights, PlacedBlock

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

    def of_one(self, h: Tensor) -> Tensor:
        """s(direction(h)) [1, hidden] of a single token h [1, hidden] in the map's precision, on a CPU.

        The same map in a third of the operations: what scales u is left to the last one.
        """
        token = h[0]
        norm = length_of_one(token)
        scale = math.sqrt(len(token)) / norm if norm > _TINY else 0.0
        return torch.addmv(self.bias, self.up, torch.mv(self.down, token), alpha=scale)[None]

    @property
    def elements(self) -> int:
        """Numbers that a token reads where the map runs."""
        return self.down.numel() + self.up.numel() + self.bias.numel()

    @property
    def weight_bytes(self) -> int:
        """Their bytes."""
        return sum(t.numel() * t.element_size() for t in (self.down, self.up, self.bias))

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The same map elsewhere, or in another precision."""
        return LowRank(*(t.to(device, dtype) for t in (self.down, self.up, self.bias)))

    def on(self, device: torch.device) -> LowRank:
        """The same map on `device`."""
        return self if self.down.device == device else self.to(device, self.down.dtype)


@dataclass(frozen=True)
class Surrogates:
    """A surrogate for some layers of a model; a skipped FFN of any other layer adds nothing."""

    maps: Mapping[int, LowRank]

    def __call__(self, layer: int, h: Tensor) -> Tensor | None:
        """What stands in for f, [tokens, hidden] in h's dtype; None where the layer has no surrogate."""
        found = self.maps.get(layer)
        if found is None:
            return None
        if len(h) == 1 and h.device.type == "cpu" and h.dtype == found.down.dtype == torch.float32:
            return found.on(h.device).of_one(h)
        return found.on(h.device)(direction(h).to(found.down.dtype)).to(h.dtype)

    def weight_bytes(self, layer: int) -> int:
        """Bytes that a token reads instead of the FFN's."""
        found = self.maps.get(layer)
        return 0 if found is None else found.weight_bytes

    def bytes_at(self, block: BlockWeights) -> int:
        """`weight_bytes` of the block's map in the precision in which its layer computes."""
        found = self.maps.get(block.index)
        return 0 if found is None else found.elements * block.place[1].itemsize

    def digest(self) -> str:
        """Tells these surrogates from others: 16 hexadecimal digits."""
        return tensors_digest(
            t for layer in sorted(self.maps) for t in (torch.tensor(layer), *vars(self.maps[layer]).values())
        )

    def for_blocks(self, blocks: Iterable[PlacedBlock]) -> Surrogates:
        """The maps in the precision and on the device of their layers."""
        return Surrogates(
            {
                block.index: self.maps[block.index].to(*block.place)
                for block in blocks
                if block.index in self.maps
            }
        )


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """The first 16 hexadecimal digits of a hash over values."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def length_of_one(token: Tensor) -> float:
    """||h|| of one token [hidden] in float32 on a CPU, never 0, in one cheap operation."""
    return max(math.sqrt(float(torch.dot(token, token))), _TINY)


def direction(h: Tensor) -> Tensor:
    """sqrt(hidden) * h / ||h||, in float32: [..., hidden]. A zero vector stays zero."""
    stream = h.float()
    norm = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).clamp_min(_TINY)
    u: Tensor = stream / norm * math.sqrt(h.shape[-1])  # the other order overflows at a zero vector
    return u


def rank_for(budget: float, hidden: int, ffn_bytes: int, element_bytes: int) -> int:
    """The largest rank whose map takes at most `budget` of the FFN's bytes, but 1 at least."""
    if not 0 < budget < 1:
        raise ConfigError(
            f"surrogate budget {budget:g} is not within (0, 1); it is a share of the FFN's bytes"
        )
    rank = int((budget * ffn_bytes / element_bytes - hidden) // (2 * hidden))
    return min(max(rank, 1), hidden)
