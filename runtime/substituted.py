"""Any FFN-skipping policy with surrogates in place of what it skips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from skipcal.runtime.engines.choice import ffn_engine
from skipcal.runtime.surrogates import Surrogates

if TYPE_CHECKING:
    from skipcal.arch.locate import Architecture, Block
    from skipcal.runtime.engines.base import Engine
    from skipcal.runtime.policy import Policy
    from skipcal.runtime.rules import Rule

    class FfnPolicy(Policy, Protocol):
        """A policy that chooses FFN blocks."""

        def make_rule(self) -> Rule:
            """The rule, as engines ask it."""


@dataclass(frozen=True)
class Substituted:
    """`policy`, where a skipped FFN adds its surrogate to the stream instead of nothing."""

    policy: FfnPolicy
    surrogates: Surrogates
    unit: Literal["ffn"] = "ffn"

    @property
    def method(self) -> str:
        """The policy's, marked."""
        return self.policy.method if self.policy.method == "full" else f"{self.policy.method}+surrogates"

    @property
    def warm_up_tokens(self) -> int:
        """The policy's."""
        return self.policy.warm_up_tokens

    @property
    def threshold(self) -> float | None:
        """The policy's, if it has one."""
        return getattr(self.policy, "threshold", None)

    def check_layers(self, num_layers: int) -> None:
        """As the policy does."""
        self.policy.check_layers(num_layers)

    def saved_bytes(self, block: Block) -> int:
        """Those of the FFN block, less the surrogate's."""
        return self.policy.saved_bytes(block) - self.surrogates.bytes_at(block)

    def engine(self, architecture: Architecture, asked: str = "auto") -> Engine:
        """A fresh engine under the policy's rule."""
        surrogates = self.surrogates.for_model(architecture)
        return ffn_engine(architecture, self.policy.make_rule(), asked, surrogates=surrogates)

    def to_dict(self) -> dict[str, Any]:
        """The policy, and which surrogates."""
        return {"policy": self.policy.to_dict(), "surrogates": self.surrogates.digest()}
