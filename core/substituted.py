"""Any FFN-skipping policy with surrogates in place of what it skips."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from skipcal.core.surrogates import Surrogates

if TYPE_CHECKING:
    from skipcal.core.host import BlockWeights
    from skipcal.core.policy import Policy
    from skipcal.core.rule import Rule


@dataclass(frozen=True)
class Substituted:
    """`policy`, where a skipped FFN adds its surrogate to the stream instead of nothing.

    stand_in: "surrogates" of a gate, or those "fitted" to the policy itself.
    """

    policy: Policy
    surrogates: Surrogates
    stand_in: Literal["surrogates", "fitted"] = "surrogates"
    unit: Literal["ffn"] = "ffn"

    @property
    def method(self) -> str:
        """The policy's, marked."""
        return self.policy.method if self.policy.method == "full" else f"{self.policy.method}+{self.stand_in}"

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

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the FFN block, less the surrogate's."""
        return self.policy.saved_bytes(block) - self.surrogates.bytes_at(block)

    def make_rule(self) -> Rule:
        """The policy's."""
        return self.policy.make_rule()

    def to_dict(self) -> dict[str, Any]:
        """The policy, and which surrogates."""
        return {"policy": self.policy.to_dict(), "surrogates": self.surrogates.digest()}
