"""Baselines that leave out whole layers: ShortGPT (a fixed set) and SkipDecode (by position)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from skipcal.errors import ConfigError, ProfileMismatch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from skipcal.core.host import BlockWeights, PassTokens
    from skipcal.core.rule import Rule


@dataclass(frozen=True, kw_only=True)
class ShortGPT:
    """Remove the layers of least Block Influence, for all tokens, the prompt too (arXiv 2403.03853).

    There is no warm-up: a removed layer has no keys and values that a later step could read.
    """

    removed: tuple[int, ...]
    method: Literal["shortgpt"] = "shortgpt"
    unit: Literal["layer"] = "layer"
    warm_up_tokens: Literal[0] = 0

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when a layer does not exist, ConfigError when none would be left."""
        if self.removed and max(self.removed) >= num_layers:
            raise ProfileMismatch(
                f"shortgpt: layer {max(self.removed)} lies beyond the model's {num_layers} layers"
            )
        if len(self.removed) >= num_layers:
            raise ConfigError(f"shortgpt would remove all {num_layers} layers; lower the skip ratio")

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values."""
        return asdict(self)

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the whole layer."""
        return block.layer_bytes

    def make_rule(self) -> Rule:
        """There is none: what is removed cannot be asked for. A host runs the model without it."""
        raise TypeError("shortgpt removes layers from the model; it has no rule")


@dataclass(frozen=True, kw_only=True)
class SkipDecode:
    """Run ever fewer layers the further decoding has come (arXiv 2307.02628).

    The number of layers that decode step s runs falls linearly from `max_layers` at step 0 to
    `min_layers` at step `steps` - 1 and stays there: the same for all rows of a batch. The first
    `warm_up_layers` and the topmost ones run, those between are passed by. As the number never
    rises, every token has keys and values in each layer that a later one runs.

    num_layers: of the model. min_layers may be a fraction; the schedule is rounded step by step.
    """

    num_layers: int
    max_layers: float
    min_layers: float
    steps: int
    warm_up_layers: int = 1
    method: Literal["skipdecode"] = "skipdecode"
    unit: Literal["layer"] = "layer"
    warm_up_tokens: Literal[0] = 0

    def __post_init__(self) -> None:
        """Refuse a schedule that rises, or leaves no layer above the warm-up layers."""
        if not 1 <= self.warm_up_layers < self.min_layers <= self.max_layers <= self.num_layers:
            raise ConfigError(
                f"skipdecode: expected 1 <= warm_up_layers {self.warm_up_layers} < min_layers "
                f"{self.min_layers:g} <= max_layers {self.max_layers:g} <= {self.num_layers} layers"
            )
        if self.steps < 1:
            raise ConfigError(f"skipdecode: a schedule over {self.steps} steps; expected 1 or more")

    def layers_run(self, step: int) -> int:
        """Number of layers that decode step `step` runs."""
        done = min(step, self.steps - 1) / max(self.steps - 1, 1)
        return round(self.max_layers - (self.max_layers - self.min_layers) * done)

    def mean_skip_ratio(self) -> float:
        """Mean share of layers passed by, over the steps of the schedule."""
        run = sum(self.layers_run(step) for step in range(self.steps))
        return 1 - run / (self.num_layers * self.steps)

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when the schedule is for another number of layers."""
        if num_layers != self.num_layers:
            raise ProfileMismatch(f"skipdecode: a schedule for {self.num_layers} layers, not {num_layers}")

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values."""
        return asdict(self)

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the whole layer."""
        return block.layer_bytes

    def make_rule(self) -> ScheduleRule:
        """The schedule, layer by layer."""
        return ScheduleRule(self)


class ScheduleRule:
    """The rule of `SkipDecode`: layer i of the middle is passed by from a certain step on."""

    learns: ClassVar[bool] = False

    def __init__(self, policy: SkipDecode) -> None:
        """Find the first step at which each layer is passed by."""
        runs = [policy.layers_run(step) for step in range(policy.steps)]
        self._from: dict[int, int] = {}
        for layer in range(policy.warm_up_layers, policy.num_layers):
            # Layer i is among the topmost n - warm_up_layers while i >= L - (n - warm_up_layers).
            needed = policy.num_layers - layer + policy.warm_up_layers
            first = next((step for step, run in enumerate(runs) if run < needed), None)
            if first is not None:
                self._from[layer] = first
        self.layers: Collection[int] = frozenset(self._from)

    def start(self, tokens: PassTokens, device: torch.device) -> ScheduleState:
        """The decode step of each token."""
        import torch

        assert tokens.active is not None
        return ScheduleState(torch.as_tensor(tokens.step, device=device).expand(len(tokens.active)))

    def before(self, layer: int, state: ScheduleState, h: Tensor) -> tuple[Tensor, ScheduleState]:
        """Tokens whose step lies past the layer's last."""
        return state.step >= self._from[layer], state

    def after(self, layer: int, state: Any, h: Tensor, f: Tensor, ran: Tensor | bool) -> Any:
        """Nothing is learnt from the stream."""
        return state


@dataclass(frozen=True)
class ScheduleState:
    """Decode step of each token, [tokens]."""

    step: Tensor

    def to(self, device: torch.device) -> ScheduleState:
        """The state on `device`."""
        return self if self.step.device == device else ScheduleState(self.step.to(device))
