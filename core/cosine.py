"""The rule `cosine`: algorithm 1 of FFN-SkipLLM."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from skipcal.core.batch_rule import judged_together
from skipcal.core.host import PassTokens
from skipcal.core.residual import residual_cosine, residual_cosine_of_one


class CosineState(NamedTuple):
    """State of the rule `cosine`."""

    armed: Tensor | bool  # [tokens] bool: the cosine has passed the threshold
    skipped: Tensor | int  # [tokens] int32: FFNs skipped so far
    live: Tensor | None = None  # [tokens] bool: rows whose text goes on; None: all

    def to(self, device: torch.device) -> CosineState:
        """The state on `device`."""
        if not isinstance(self.armed, Tensor) or not isinstance(self.skipped, Tensor):
            return self
        if self.armed.device == device:
            return self
        live = None if self.live is None else self.live.to(device)
        return CosineState(self.armed.to(device), self.skipped.to(device), live)


class CosineRule:
    """Algorithm 1 of FFN-SkipLLM (arXiv 2404.03865), with the paper's k as `max_skips`.

    Within [cold_s, cold_e) a token is armed by the first FFN whose cosine reaches the threshold;
    from the next layer on its FFNs are skipped, until `cold_e` or until `max_skips` are used up.
    Nothing re-arms, for `skipped` only grows.
    """

    learns: ClassVar[bool] = True

    def __init__(
        self, layers: range, *, threshold: float, max_skips: int | None = None, batch_rule: str = "rows"
    ) -> None:
        """layers: the region [cold_s, cold_e). The rest is SkipPolicy's; batch_rule: see core.batch_rule."""
        self.layers = layers
        self.threshold = threshold
        self.max_skips = max_skips
        self.batch_rule = batch_rule

    def start(self, tokens: PassTokens, device: torch.device) -> CosineState:
        """No token is armed, none has skipped."""
        assert tokens.active is not None
        count = len(tokens.active)
        if count == 1 and not tokens.on_device:
            return CosineState(armed=False, skipped=0)
        return CosineState(
            armed=torch.zeros(count, dtype=torch.bool, device=device),
            skipped=torch.zeros(count, dtype=torch.int32, device=device),
            live=tokens.counted,
        )

    def before(self, layer: int, state: CosineState, h: Tensor) -> tuple[Tensor | bool, CosineState]:
        """Armed tokens skip, while they have skips left."""
        if self.max_skips is None:
            return state.armed, state
        skip = state.armed & (state.skipped < self.max_skips)
        return skip, state._replace(skipped=state.skipped + skip)

    def after(self, layer: int, state: CosineState, h: Tensor, f: Tensor, ran: Tensor | bool) -> CosineState:
        """Arm the tokens that ran and whose cosine reaches the threshold."""
        if state.armed is True:  # a single token, and nothing left to find out
            return state
        if state.armed is False and h.device.type == "cpu":
            return state._replace(armed=residual_cosine_of_one(h, f) >= self.threshold)
        cosine = judged_together(residual_cosine(h, f), state.live, self.batch_rule)
        saturated = cosine >= self.threshold
        armed = state.armed | (ran & saturated)
        return state._replace(armed=bool(armed) if state.armed is False else armed)
