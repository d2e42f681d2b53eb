"""What a captured step does outside its layers, in a launch each: angles of positions, and the last norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipcal.arch.patch import InstancePatches
from skipcal.ops.rms_norm import rms_norm


class Outside:
    """Stands on the rotary embedding and the norm of a stack whose layers are all fused."""

    def __init__(self, stack: Any, hidden: int, room: int) -> None:
        """hidden: of the stream. room: positions that a step can have.

        The model's own module makes their angles, which depend on nothing else: embeddings that look at
        how long the text is are refused.
        """
        self._rotary, self._norm = stack.rotary_emb, getattr(stack, "norm", None)
        weight = next(stack.parameters())
        places = torch.arange(room, device=weight.device)[None]
        cos, sin = self._rotary(weight.new_zeros(1, 1, hidden), places)
        self._angles = torch.cat([cos[0], sin[0]], dim=-1)  # [room, 2 * rotary]
        self._fits = _is_rms_norm(self._norm)

    def set_on(self, patches: InstancePatches, *, tabled: bool) -> None:
        """tabled: the positions are among those of the table."""
        if tabled:
            patches.set(self._rotary, "forward", self._looked_up)
        if self._fits:
            patches.set(self._norm, "forward", self._normed)

    def _looked_up(self, _h: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [batch, 1, rotary], of positions [batch, 1]."""
        found = self._angles.index_select(0, position_ids.view(-1))[:, None]
        cos, sin = found.chunk(2, dim=-1)
        return cos, sin

    def _normed(self, h: Tensor) -> Tensor:
        return _normed(self._norm, h)


def _normed(norm: Any, h: Tensor) -> Tensor:
    return rms_norm(h.reshape(-1, h.shape[-1]), norm.weight, norm.variance_epsilon).view_as(h)


def _is_rms_norm(norm: Any) -> bool:
    """Whether the op gives what the module gives."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(weight, Tensor) or not weight.is_contiguous():
        return False
    h = torch.linspace(-3.0, 5.0, weight.numel()).to(weight.device, weight.dtype)[None]
    noise = 4 * torch.finfo(h.dtype).eps  # of two roundings, and of sums in another order
    return torch.allclose(_normed(norm, h), norm.forward(h), rtol=noise, atol=noise)
