"""Policies that skip the same number of FFN blocks of every token: what `skipcal bench` times.

The ratio is forced, so that each step does the same work; the decision is made in full all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from skipcal.core.gate import NEVER, GatePolicy, Gates
from skipcal.core.policy import FULL_MODEL_THRESHOLD, Policy, SkipPolicy
from skipcal.core.surrogates import LowRank, Surrogates

_SURE = 1e30  # a bias that no score outweighs


class Forced(Protocol):
    """The policies of one rule that a measurement needs."""

    @property
    def most(self) -> int:
        """FFN blocks of a token that can be skipped at most."""

    @property
    def limit(self) -> str:
        """Why no more of them."""

    def full(self) -> Policy:
        """The rule's own twin of the full model: the same engine, asked nothing."""

    def watching(self) -> Policy:
        """Every decision is made, nothing is skipped."""

    def skipping(self, count: int) -> Policy:
        """`count` FFN blocks of every token are skipped."""


@dataclass(frozen=True)
class ForcedCosine:
    """The rule `cosine` over the widest region.

    With a threshold of -1 the region's first FFN arms every token, and `max_skips` FFNs after it are
    skipped.
    """

    num_layers: int

    @property
    def most(self) -> int:
        """All of the region but the FFN that arms."""
        return max(self.num_layers - 3, 0)

    @property
    def limit(self) -> str:
        """Why no more of them."""
        return (
            f"of {self.num_layers} layers the first and the last FFN always run, and one more arms the token"
        )

    def full(self) -> Policy:
        """An empty region."""
        return self._policy(FULL_MODEL_THRESHOLD, cold_e=1)

    def watching(self) -> Policy:
        """A threshold that no cosine reaches."""
        return self._policy(FULL_MODEL_THRESHOLD)

    def skipping(self, count: int) -> Policy:
        """The FFNs after the one that arms."""
        return self._policy(-1.0, max_skips=count)

    def _policy(
        self, threshold: float, cold_e: int | None = None, max_skips: int | None = None
    ) -> SkipPolicy:
        return SkipPolicy(
            cold_s=1,
            cold_e=self.num_layers - 1 if cold_e is None else cold_e,
            threshold=threshold,
            max_skips=max_skips,
            warm_up_tokens=0,
        )


@dataclass(frozen=True)
class ForcedGate:
    """A gate and its surrogates, with biases that settle what the probes' scores would."""

    policy: GatePolicy
    num_layers: int

    @property
    def most(self) -> int:
        """The gate's candidates."""
        return len(self.policy.gates.layers)

    @property
    def limit(self) -> str:
        """Why no more of them."""
        return f"the gate may skip {self.most} of {self.num_layers} FFNs"

    def full(self) -> Policy:
        """A gate without candidates."""
        gates = self.policy.gates
        none = Gates((), gates.weight[:0], gates.log_norm_weight[:0], gates.bias[:0])
        return replace(self.policy, gates=none, threshold=NEVER, warm_up_tokens=0)

    def watching(self) -> Policy:
        """A threshold that no score lies below."""
        return replace(self.policy, threshold=NEVER, warm_up_tokens=0)

    def skipping(self, count: int) -> Policy:
        """Candidates evenly spaced over the layers."""
        gates = self.policy.gates
        bias = torch.full_like(gates.bias, _SURE)
        for place in range(count):
            bias[(2 * place + 1) * self.most // (2 * count)] = -_SURE
        return replace(self.policy, gates=replace(gates, bias=bias), threshold=0.0, warm_up_tokens=0)


def random_gate(num_layers: int, hidden: int, *, rank: int, seed: int) -> GatePolicy:
    """A gate for every layer but the first and the last, as fitted ones have, with random numbers."""
    random = torch.Generator().manual_seed(seed)
    layers = tuple(range(1, num_layers - 1))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random) / hidden

    maps = {layer: LowRank(normal(rank, hidden), normal(hidden, rank), normal(hidden)) for layer in layers}
    gates = Gates(layers, normal(len(layers), hidden), normal(len(layers)), normal(len(layers)))
    return GatePolicy(gates=gates, surrogates=Surrogates(maps), threshold=NEVER, warm_up_tokens=0)
