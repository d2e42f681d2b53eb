"""Surrogates: what a skipped FFN block is replaced by, a low-rank linear map of the stream's direction.

A pre-norm FFN sees its input only after a norm, which keeps the direction of the residual stream
and drops its length. So a surrogate is given the direction too,

    u = sqrt(hidden) * h / ||h||        (an RMSNorm without weights)
    s_i(u) = up_i (down_i u) + bias_i   (rank r: 2 r hidden + hidden weights)

and stands in for the whole block: norm, FFN, and what may come after. Nothing of the block is
read for a token that skips it, whatever the family of the model. One map is an average over all tokens; of
several that share `down` a token reads one, so it reads as much, and only memory grows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Self, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcal.errors import ConfigError

if TYPE_CHECKING:
    from skipcal.core.host import BlockWeights, PlacedBlock

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class _Map:
    """What one layer's tensors have in common, however many maps they are."""

    down: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order in which they are declared."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def elements(self, tokens: int = 1) -> int:
        """Numbers that are read where so many tokens are given what stands in, at most."""
        raise NotImplementedError

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes that a token reads."""
        return self.elements() * self.down.element_size()

    def to(self, device: torch.device, dtype: torch.dtype) -> Self:
        """The same map elsewhere, or in another precision."""
        return type(self)(*(t.to(device, dtype) for t in self.tensors))

    def on(self, device: torch.device) -> Self:
        """The same map on `device`."""
        return self if self.down.device == device else self.to(device, self.down.dtype)


@dataclass(frozen=True)
class LowRank(_Map):
    """One layer's map. down: [rank, hidden], up: [hidden, rank], bias: [hidden]; all of one dtype."""

    up: Tensor
    bias: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """s(u), [..., hidden], of directions u [..., hidden]."""
        return F.linear(F.linear(u, self.down), self.up, self.bias)

    def of_one(self, h: Tensor) -> Tensor:
        """s(direction(h)) [1, hidden] of a single token h [1, hidden] in the map's precision, on a CPU.

        The same map in a third of the operations: what scales u is left to the last one.
        """
        return torch.addmv(self.bias, self.up, torch.mv(self.down, h[0]), alpha=_to_direction(h))[None]

    def elements(self, tokens: int = 1) -> int:
        """All of them, once."""
        return self.down.numel() + self.up.numel() + self.bias.numel() if tokens else 0


@dataclass(frozen=True)
class RoutedLowRank(_Map):
    """One layer's maps, of which a token reads one: that of the region of directions it lies in.

        k = argmax_k (route_k u + route_bias_k)      s(u) = up_k (down u) + bias_k

    down: [rank + maps, hidden]: the rows that all maps share, and under them those of the route, so that one
    product gives both. up: [maps, hidden, rank], bias: [maps, hidden], route_bias: [maps]; all of one dtype.
    """

    up: Tensor
    bias: Tensor
    route_bias: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        """s(u), [..., hidden], of directions u [..., hidden]."""
        maps, hidden, rank = self.up.shape
        both = F.linear(u.reshape(-1, hidden), self.down)
        z, chosen = both[:, :rank], (both[:, rank:] + self.route_bias).argmax(-1)
        if len(z) <= maps and z.device.type != "cpu":  # gathered, for to look at `chosen` is to wait for it
            s = torch.baddbmm(self.bias[chosen][:, :, None], self.up[chosen], z[:, :, None])
            return s.view(u.shape)
        s = torch.empty_like(u).view(-1, hidden)
        tokens: dict[int, list[int]] = {}
        for token, k in enumerate(chosen.tolist()):
            tokens.setdefault(k, []).append(token)
        for k, own in tokens.items():
            s[own] = F.linear(z[own], self.up[k], self.bias[k])
        return s.view(u.shape)

    def of_one(self, h: Tensor) -> Tensor:
        """s(direction(h)) [1, hidden] of a single token h [1, hidden] in the maps' precision, on a CPU."""
        rank = self.up.shape[-1]
        both, scale = torch.mv(self.down, h[0]), _to_direction(h)
        route = [
            scale * along + bias for along, bias in zip(both[rank:].tolist(), self._route_biases, strict=True)
        ]
        k = route.index(max(route))
        return torch.addmv(self.bias[k], self.up[k], both[:rank], alpha=scale)[None]

    @cached_property
    def _route_biases(self) -> list[float]:
        return self.route_bias.tolist()

    def elements(self, tokens: int = 1) -> int:
        """Those of a map for each token, as far as there are so many, and what all maps share."""
        own = min(tokens, len(self.up)) * (self.up[0].numel() + self.bias[0].numel())
        return own + self.down.numel() + self.route_bias.numel() if tokens else 0


Surrogate: TypeAlias = LowRank | RoutedLowRank


def _to_direction(h: Tensor) -> float:
    """What one token h [1, hidden] on a CPU is multiplied by to make its direction; 0 of a zero vector."""
    stream = h if h.dtype == torch.float32 else h.float()
    # By the call that multiplies the model's matrices: code of another would come from memory here.
    norm = math.sqrt(F.linear(stream, stream).item())
    return math.sqrt(h.shape[1]) / norm if norm > _TINY else 0.0


@dataclass(frozen=True)
class Surrogates:
    """A surrogate for some layers of a model; a skipped FFN of any other layer adds nothing."""

    maps: Mapping[int, Surrogate]

    def __call__(self, layer: int, h: Tensor) -> Tensor | None:
        """What stands in for f, [tokens, hidden] in h's dtype; None where the layer has no surrogate."""
        found = self.maps.get(layer)
        if found is None:
            return None
        # Not in float16, whose range ends where products of h, whatever its length, do not.
        if len(h) == 1 and h.is_cpu and h.dtype == found.down.dtype != torch.float16:
            return found.on(h.device).of_one(h)
        return found.on(h.device)(direction(h).to(found.down.dtype)).to(h.dtype)

    def weight_bytes(self, layer: int) -> int:
        """Bytes that a token reads instead of the FFN's."""
        found = self.maps.get(layer)
        return 0 if found is None else found.weight_bytes

    def bytes_at(self, block: BlockWeights, tokens: int = 1) -> int:
        """What so many tokens read at most, in the precision in which the block's layer computes."""
        found = self.maps.get(block.index)
        return 0 if found is None else found.elements(tokens) * block.place[1].itemsize

    def digest(self) -> str:
        """Tells these surrogates from others: 16 hexadecimal digits."""
        return tensors_digest(
            t for layer in sorted(self.maps) for t in (torch.tensor(layer), *self.maps[layer].tensors)
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


def direction(h: Tensor) -> Tensor:
    """sqrt(hidden) * h / ||h||, in float32: [..., hidden]. A zero vector stays zero."""
    stream = h.float()
    norm = torch.linalg.vector_norm(stream, dim=-1, keepdim=True).clamp_min(_TINY)
    u: Tensor = stream / norm * math.sqrt(h.shape[-1])  # the other order overflows at a zero vector
    return u


def rank_for(budget: float, hidden: int, ffn_bytes: int, element_bytes: int, *, maps: int = 1) -> int:
    """The largest rank of which a token reads at most `budget` of the FFN's bytes, but 1 at least.

    maps: how many there are, of which it reads one; several have a route.
    """
    if not 0 < budget < 1:
        raise ConfigError(
            f"surrogate budget {budget:g} is not within (0, 1); it is a share of the FFN's bytes"
        )
    route = maps * (hidden + 1) if maps > 1 else 0
    rank = int((budget * ffn_bytes / element_bytes - hidden - route) // (2 * hidden))
    return min(max(rank, 1), hidden)
