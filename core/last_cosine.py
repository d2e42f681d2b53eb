"""The rule `cosine` with tolerances: the last FFN that ran decides about the next one, layer by layer.

Ours. Algorithm 1 arms a token once and then skips all that follows; its harm is in these runs of skips and
in layers whose FFN is needed though the stream hardly turns there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from skipcal.core.batch_rule import judged_together
from skipcal.core.host import PassTokens
from skipcal.core.residual import residual_cosine, residual_cosine_of_one


class LastCosineState(NamedTuple):
    """State of the rule `cosine` with tolerances."""

    cosine: Tensor | float  # [tokens] float32: of the last FFN that ran, -inf before the first
    skipped: Tensor | int  # [tokens] int32: FFNs skipped since
    live: Tensor | None = None  # [tokens] bool: rows whose text goes on; None: all

    def to(self, device: torch.device) -> LastCosineState:
        """The state on `device`."""
        if not isinstance(self.cosine, Tensor) or not isinstance(self.skipped, Tensor):
            return self
        if self.cosine.device == device:
            return self
        live = None if self.live is None else self.live.to(device)
        return LastCosineState(self.cosine.to(device), self.skipped.to(device), live)


class LastCosineRule:
    """FFN j of [cold_s, cold_e) is skipped where the last cosine reaches 1 - (1 - threshold) * tolerances[j].

    The last cosine is that of the region's last FFN that ran; after `max_skips` skips in a row one has to.
    """

    learns: ClassVar[bool] = True

    def __init__(
        self,
        layers: range,
        *,
        threshold: float,
        tolerances: Sequence[float],
        max_skips: int | None = None,
        batch_rule: str = "rows",
    ) -> None:
        """layers: the region [cold_s, cold_e). The rest is SkipPolicy's; batch_rule: see core.batch_rule."""
        self.layers = layers
        self.reach = {layer: 1 - (1 - threshold) * tolerances[layer] for layer in layers}
        self.max_skips = max_skips
        self.batch_rule = batch_rule

    def start(self, tokens: PassTokens, device: torch.device) -> LastCosineState:
        """No FFN has run, none was skipped."""
        assert tokens.active is not None
        count = len(tokens.active)
        if count == 1 and not tokens.on_device:
            return LastCosineState(cosine=-math.inf, skipped=0)
        return LastCosineState(
            cosine=torch.full((count,), -math.inf, device=device),
            skipped=torch.zeros(count, dtype=torch.int32, device=device),
            live=tokens.counted,
        )

    def before(self, layer: int, state: LastCosineState, h: Tensor) -> tuple[Tensor | bool, LastCosineState]:
        """Tokens whose last cosine reaches what this layer asks for, while they may skip in a row."""
        skip = state.cosine >= self.reach[layer]
        if self.max_skips is None:
            return skip, state
        skip = skip & (state.skipped < self.max_skips)
        return skip, state._replace(skipped=state.skipped + skip)

    def after(
        self, layer: int, state: LastCosineState, h: Tensor, f: Tensor, ran: Tensor | bool
    ) -> LastCosineState:
        """Tokens that ran are judged by this FFN's cosine from here on."""
        if isinstance(state.cosine, Tensor):
            judged = torch.as_tensor(ran, device=h.device)
            found = judged_together(residual_cosine(h, f), state.live, self.batch_rule)
            return state._replace(
                cosine=torch.where(judged, found, state.cosine),
                skipped=torch.where(judged, 0, torch.as_tensor(state.skipped)),
            )
        if not ran:  # a host may tell of its other tokens too
            return state
        cosine = residual_cosine_of_one(h, f) if h.device.type == "cpu" else residual_cosine(h, f).item()
        return state._replace(cosine=cosine, skipped=0)
