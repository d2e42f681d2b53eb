"""The rule `gate`: before an FFN runs, a linear probe of the stream predicts what skipping it would harm.

For the stream h that enters FFN i, with u = sqrt(hidden) * h / ||h|| its direction,

    score_i = weight_i . u + log_norm_weight_i * log ||h|| + bias_i

predicts the logarithm of the damage done when the surrogate stands in for the FFN (ours). The FFN is
skipped where the score lies below one threshold, the same for all layers: damages are comparable.
Any layer may be a candidate; there is no region and nothing is armed.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from skipcal.core.surrogates import Surrogates, tensors_digest
from skipcal.errors import ConfigError, ProfileMismatch

if TYPE_CHECKING:
    from skipcal.core.host import BlockWeights, PassTokens

_TINY = torch.finfo(torch.float32).tiny
NEVER = -math.inf  # no score lies below it


@dataclass(frozen=True)
class Gates:
    """The probes of all candidate layers, float32.

    layers: ascending; weight: [candidates, hidden]; log_norm_weight and bias: [candidates].
    """

    layers: tuple[int, ...]
    weight: Tensor
    log_norm_weight: Tensor
    bias: Tensor


@dataclass(frozen=True, kw_only=True)
class GatePolicy:
    """Skip FFN i for a token where its gate's score lies below `threshold`; the surrogate stands in.

    threshold:      predicted log damage; -inf is the full model.
    warm_up_tokens: decode steps of each row that always run the full model.
    Raises ConfigError for a threshold that is no number.
    """

    gates: Gates
    surrogates: Surrogates
    threshold: float
    warm_up_tokens: int
    unit: Literal["ffn"] = "ffn"

    def __post_init__(self) -> None:
        """Refuse what no score can be compared with."""
        if math.isnan(self.threshold):
            raise ConfigError("threshold nan is no number; a gate's threshold is a log damage")
        if self.warm_up_tokens < 0:
            raise ConfigError(f"warm_up_tokens {self.warm_up_tokens} is negative; expected 0 or more")

    @property
    def method(self) -> str:
        """`gate`, or `full` where nothing can be skipped."""
        return "full" if self.threshold == NEVER or not self.gates.layers else "gate"

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when a gate is for a layer that does not exist."""
        if self.gates.layers and self.gates.layers[-1] >= num_layers:
            raise ProfileMismatch(
                f"gate: layer {self.gates.layers[-1]} lies beyond the model's {num_layers} layers"
            )

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values; tensors by a digest."""
        gates = (self.gates.weight, self.gates.log_norm_weight, self.gates.bias)
        return {
            "rule": "gate",
            "threshold": self.threshold if math.isfinite(self.threshold) else str(self.threshold),
            "warm_up_tokens": self.warm_up_tokens,
            "layers": list(self.gates.layers),
            "gates": tensors_digest(gates),
            "surrogates": self.surrogates.digest(),
        }

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the FFN block, less the surrogate's."""
        return block.weight_bytes - self.surrogates.bytes_at(block)

    def make_rule(self) -> GateRule:
        """The gates, layer by layer."""
        return GateRule(self.gates, self.threshold)


@dataclass(frozen=True)
class GateState:
    """A gate remembers nothing from layer to layer. on_device: the answer has to stay there."""

    on_device: bool

    def to(self, device: torch.device) -> GateState:
        """Itself."""
        return self


class GateRule:
    """The rule of `GatePolicy`."""

    learns: ClassVar[bool] = False

    def __init__(self, gates: Gates, threshold: float) -> None:
        """Take the probes apart by layer."""
        self.layers: Collection[int] = frozenset(gates.layers)
        self.gates = gates
        self.threshold = threshold
        scale = math.sqrt(gates.weight.shape[-1])
        # On the host, for a single token: sqrt(hidden) * weight, [1, hidden], and two scalars.
        rows = scale * gates.weight[:, None].cpu()
        self._probe: dict[int, tuple[Tensor, float, float]] = {
            layer: (row, float(slope), float(bias))
            for layer, row, slope, bias in zip(
                gates.layers, rows, gates.log_norm_weight, gates.bias, strict=True
            )
        }
        self._weight = {layer: row[0] for layer, (row, _, _) in self._probe.items()}  # where its layer is

    def start(self, tokens: PassTokens, device: torch.device) -> GateState:
        """Nothing to remember."""
        return GateState(tokens.on_device)

    def before(self, layer: int, state: GateState, h: Tensor) -> tuple[Tensor | bool, GateState]:
        """Tokens whose score lies below the threshold."""
        scores = self._scores_no_sync(layer, h) if state.on_device else self.scores(layer, h)
        return scores < self.threshold, state

    def scores(self, layer: int, h: Tensor) -> Tensor | float:
        """Predicted log damage of each token, [tokens]; a number for a single token on the CPU."""
        if h.shape[0] > 1 or not h.is_cpu:
            return self._scores_no_sync(layer, h)
        # Two small products by the call that multiplies the model's matrices, and no function around them: an
        # FFN's weights push all code out of a core's cache, and what is called here comes from memory again.
        row, slope, bias = self._probe[layer]
        stream = h if h.dtype == torch.float32 else h.float()
        norm = max(math.sqrt(F.linear(stream, stream).item()), _TINY)
        along: float = F.linear(stream, row).item()
        return along / norm + slope * math.log(norm) + bias

    def _scores_no_sync(self, layer: int, h: Tensor) -> Tensor:
        _, slope, bias = self._probe[layer]
        stream = h.float()
        norms = torch.linalg.vector_norm(stream, dim=-1).clamp_min(_TINY)
        scores: Tensor = stream @ self._weight_on(h.device, layer) / norms + slope * norms.log() + bias
        return scores

    def _weight_on(self, device: torch.device, layer: int) -> Tensor:
        weight = self._weight[layer]
        if weight.device != device:
            weight = self._weight[layer] = weight.to(device)
        return weight

    def after(self, layer: int, state: GateState, h: Tensor, f: Tensor, ran: Tensor | bool) -> GateState:
        """Nothing is learnt from the FFN."""
        return state
