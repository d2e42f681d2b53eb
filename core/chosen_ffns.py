"""Baselines that choose FFNs without looking at the token's cosine: random ones, or a fixed set."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from skipcal.errors import ConfigError, ProfileMismatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from skipcal.core.host import BlockWeights, PassTokens

_MASK = 0xFFFFFFFF
Mixed = TypeVar("Mixed", int, "Tensor")


@dataclass(frozen=True, kw_only=True)
class ChosenFFNs:
    """Skip each FFN of `layers` with `probability`; 1 is a fixed set.

    The choice is a pure function of seed, decode step, layer and the token's id. So it does not
    depend on the batch, and a teacher-forced pass chooses what decoding the same text chooses.
    """

    method: Literal["random", "no-input-adaptive", "static"]
    layers: tuple[int, ...]
    probability: float
    warm_up_tokens: int
    seed: int = 0
    unit: Literal["ffn"] = "ffn"

    def __post_init__(self) -> None:
        """Refuse what is no probability."""
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"{self.method}: {self.probability:g} is no probability within [0, 1]")

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when a layer does not exist."""
        if self.layers and max(self.layers) >= num_layers:
            raise ProfileMismatch(
                f"{self.method}: layer {max(self.layers)} lies beyond the model's {num_layers} layers"
            )

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values."""
        return asdict(self)

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the FFN block."""
        return block.weight_bytes

    def make_rule(self) -> ChoiceRule:
        """The choice, layer by layer."""
        return ChoiceRule(self)


@dataclass(frozen=True)
class ChoiceState:
    """One hash of each token, from which every layer draws."""

    token: Tensor  # [tokens] int64 within [0, 2**32)

    def to(self, device: torch.device) -> ChoiceState:
        """The state on `device`."""
        return self if self.token.device == device else ChoiceState(self.token.to(device))


class ChoiceRule:
    """The rule of `ChosenFFNs`."""

    learns: ClassVar[bool] = False

    def __init__(self, policy: ChosenFFNs) -> None:
        """Take layers, probability and seed from `policy`."""
        self.layers: Collection[int] = frozenset(policy.layers)
        self.always = policy.probability == 1  # every token skips all of them
        self._below = round(policy.probability * (_MASK + 1))
        self._seed = policy.seed

    def start(self, tokens: PassTokens, device: torch.device) -> ChoiceState:
        """Hash seed, step and id of each token."""
        import torch

        assert tokens.active is not None
        steps = torch.as_tensor(tokens.step, device=device).expand(len(tokens.active)).long()
        mixed = _hash(steps + _hash(self._seed))
        if tokens.ids is not None:
            mixed = _hash(mixed ^ tokens.ids.to(device).long())
        return ChoiceState(mixed)

    def before(self, layer: int, state: ChoiceState, h: Tensor) -> tuple[Tensor, ChoiceState]:
        """Tokens whose draw for this layer falls below the probability."""
        return _hash(state.token ^ _hash(layer + 1)) < self._below, state

    def after(self, layer: int, state: ChoiceState, h: Tensor, f: Tensor, ran: Tensor | bool) -> ChoiceState:
        """Nothing is learnt from the stream."""
        return state


def _hash(x: Mixed) -> Mixed:
    """An integer mixer on 32 bits; the multipliers keep products below 2**63, for int64 tensors."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x45D9F3B) & _MASK
    return x ^ (x >> 16)
