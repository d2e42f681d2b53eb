"""A rule: which FFNs a token skips, asked at two places of the loop over layers.

*Before* FFN i: which tokens skip it? *After* it ran: what does the token's state become? Both are pure
functions of tensors, so that any host can ask them on the device. Tokens are flattened: [tokens].

A single token, the usual decode step, is kept as Python's own bool and int: the operators are the
same, and on a CPU a tensor operation costs more than the whole decision. Not so in a captured pass
(`PassTokens.on_device`), where all is tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from skipcal.core.host import PassTokens


class RuleState(Protocol):
    """What a rule remembers of each token between the layers of one forward pass."""

    def to(self, device: torch.device) -> Self:
        """The state on `device`: layers may lie on several."""


class Rule(Protocol):
    """A way to choose the FFNs to skip."""

    @property
    def learns(self) -> bool:
        """Whether `after` tells the rule anything; where it does not, a host need not ask."""

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
