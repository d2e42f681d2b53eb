"""The skip rule, as pure functions of tensors that any engine can run on the device.

A rule is asked at two places of the loop over layers: *before* FFN i (which tokens skip it?) and
*after* it ran (what does the token's state become?). Tokens are flattened: [tokens].

A single token, the usual decode step, is kept as Python's own bool and int: the operators are the
same, and on a CPU a tensor operation costs more than the whole decision. Not so in a captured pass
(`PassTokens.on_device`), where all is tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from skipcal.arch.residual import residual_cosine, residual_cosine_of_one
from skipcal.runtime.batch_rule import judged_together
from skipcal.runtime.engines.base import PassTokens
from skipcal.runtime.policy import SkipPolicy


class RuleState(Protocol):
    """What a rule remembers of each token between the layers of one forward pass."""

    def to(self, device: torch.device) -> Self:
        """The state on `device`: layers may lie on several."""


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


class Rule(Protocol):
    """A way to choose the FFNs to skip."""

    @property
    def learns(self) -> bool:
        """Whether `after` tells the rule anything; where it does not, an engine need not ask."""

    @property
    def layers(self) -> Collection[int]:
        """Layers at which the rule has to be asked; everywhere else the FFN runs."""

    def start(self, tokens: PassTokens, device: torch.device) -> Any:
        """State (a RuleState) of fresh tokens, at the first layer."""

    def before(self, layer: int, state: Any, h: Tensor) -> tuple[Tensor | bool, Any]:
        """Mask [tokens] of those that skip FFN `layer`, and the state with that counted.

        h: [tokens, hidden], the residual stream that enters the FFN block.
        """

    def after(self, layer: int, state: Any, h: Tensor, f: Tensor, ran: Tensor | bool) -> Any:
        """State after FFN `layer` ran for the tokens in `ran`; h and f are [tokens, hidden]."""


class CosineRule:
    """Algorithm 1 of FFN-SkipLLM (arXiv 2404.03865), with the paper's k as `max_skips`.

    Within [cold_s, cold_e) a token is armed by the first FFN whose cosine reaches the threshold;
    from the next layer on its FFNs are skipped, until `cold_e` or until `max_skips` are used up.
    Nothing re-arms, for `skipped` only grows.
    """

    learns: ClassVar[bool] = True

    def __init__(self, policy: SkipPolicy, *, batch_rule: str = "rows") -> None:
        """Take the region, the threshold and `max_skips` from `policy`; see runtime.batch_rule."""
        self.batch_rule = batch_rule
        self.layers = range(policy.cold_s, policy.cold_e)
        self.threshold = policy.threshold
        self.max_skips = policy.max_skips

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
