"""What to skip: the policy that a profile recommends and a session obeys."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

from skipcal.errors import ConfigError, ProfileMismatch

if TYPE_CHECKING:
    from skipcal.core.cosine import CosineRule
    from skipcal.core.host import BlockWeights
    from skipcal.core.last_cosine import LastCosineRule
    from skipcal.core.rule import Rule

DEFAULT_WARM_UP_TOKENS = 25  # the paper's ablation saturates at 25-30 (arXiv 2404.03865, 2nd version)
FULL_MODEL_THRESHOLD = 2.0  # no cosine reaches it
_THRESHOLD_RANGE = (-1.0, 2.0)


class Policy(Protocol):
    """What a session obeys: the paper's rule (SkipPolicy) or a method it is compared with.

    What it says is data, and which rule it is. Who runs it, and how, is decided by the host. One that
    has `surrogates` (core.surrogates) has them added to the stream in place of what it skips.
    """

    @property
    def method(self) -> str:
        """Name of the method, as reports and tables show it."""

    @property
    def unit(self) -> Literal["ffn", "layer"]:
        """What is skipped: FFN blocks, or whole layers with their attention."""

    @property
    def warm_up_tokens(self) -> int:
        """Decode steps of each row that always run the full model."""

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when the policy is not for a model of `num_layers`."""

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values."""

    def saved_bytes(self, block: BlockWeights) -> int:
        """Bytes of weights that one skip of `block` leaves unread."""

    def make_rule(self) -> Rule:
        """A fresh rule, for a host to ask."""


@dataclass(frozen=True, kw_only=True)
class SkipPolicy:
    """Everything a skipping session needs to know.

    cold_s, cold_e:  the skippable region is layers [cold_s, cold_e), 0-based.
    threshold:       a token whose cosine is at or above it counts as saturated. Within [-1, 2];
                     anything above 1 is exactly the full model.
    warm_up_tokens:  decode steps of each row that always run the full model.
    max_skips:       at most so many FFNs skipped per token (the paper's k); None: until cold_e.
    tolerances:      None: Algorithm 1 of the paper. Else one number of 1 or more for each layer of the model,
                     and every FFN that runs decides anew: FFN j is skipped where the cosine of the last one
                     that ran reaches 1 - (1 - threshold) * tolerances[j]; max_skips is then of a row.
    Raises ConfigError for values outside these ranges.
    """

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012  (a misspelt key is an error)

    cold_s: int
    cold_e: int
    threshold: float
    warm_up_tokens: int = DEFAULT_WARM_UP_TOKENS
    max_skips: int | None = None
    tolerances: tuple[float, ...] | None = None
    rule: Literal["cosine"] = "cosine"

    def __post_init__(self) -> None:
        """Refuse what no layer and no cosine can mean."""
        low, high = _THRESHOLD_RANGE
        if not math.isfinite(self.threshold) or not low <= self.threshold <= high:
            raise ConfigError(
                f"threshold {self.threshold} is not within [{low:g}, {high:g}]; "
                "it is a cosine, not a percentage (above 1: the full model)"
            )
        if not 0 <= self.cold_s <= self.cold_e:
            raise ConfigError(
                f"cold_s {self.cold_s} and cold_e {self.cold_e} are no layer range; "
                "expected 0 <= cold_s <= cold_e"
            )
        if self.warm_up_tokens < 0:
            raise ConfigError(f"warm_up_tokens {self.warm_up_tokens} is negative; expected 0 or more")
        if self.max_skips is not None and self.max_skips < 0:
            raise ConfigError(f"max_skips {self.max_skips} is negative; expected 0 or more, or null")
        if any(not math.isfinite(each) or each < 1 for each in self.tolerances or ()):
            raise ConfigError(f"tolerances {self.tolerances} are not all 1 or more; the smallest is to be 1")
        if self.rule != "cosine":
            raise ConfigError(f"rule {self.rule!r} is not known; expected 'cosine'")

    @property
    def method(self) -> str:
        """`ffn-skip`, `ffn-skip+damage` with tolerances, or `full` where nothing can be skipped."""
        if self.cold_s == self.cold_e or self.threshold > 1:
            return "full"
        return "ffn-skip" if self.tolerances is None else "ffn-skip+damage"

    @property
    def unit(self) -> Literal["ffn", "layer"]:
        """FFN blocks are skipped; attention always runs."""
        return "ffn"

    def to_dict(self) -> dict[str, Any]:
        """All that decides what is skipped, as plain values."""
        return without_absent_tolerances(asdict(self))

    def saved_bytes(self, block: BlockWeights) -> int:
        """Those of the FFN block."""
        return block.weight_bytes

    def make_rule(self, *, batch_rule: str = "rows") -> CosineRule | LastCosineRule:
        """The rule `cosine`; batch_rule: as `skipping` takes it."""
        from skipcal.core.cosine import CosineRule  # torch comes with it
        from skipcal.core.last_cosine import LastCosineRule

        region = range(self.cold_s, self.cold_e)
        if self.tolerances is None:
            return CosineRule(
                region, threshold=self.threshold, max_skips=self.max_skips, batch_rule=batch_rule
            )
        return LastCosineRule(
            region,
            threshold=self.threshold,
            tolerances=self.tolerances,
            max_skips=self.max_skips,
            batch_rule=batch_rule,
        )

    def most_skips(self) -> int:
        """The largest number of FFNs this policy can skip for one token, whatever the threshold.

        The first FFN of the region has to run, for its cosine arms the token; with tolerances also one
        after every `max_skips`.
        """
        reachable = max(self.cold_e - self.cold_s - 1, 0)
        if self.max_skips is None:
            return reachable
        if self.tolerances is not None:
            return reachable - reachable // (self.max_skips + 1)
        return min(self.max_skips, reachable)

    def check_layers(self, num_layers: int) -> None:
        """Raise ProfileMismatch when the region does not lie within a model of `num_layers`."""
        if self.cold_e > num_layers:
            raise ProfileMismatch(
                f"cold_e {self.cold_e} lies beyond the model's {num_layers} layers; "
                "use a profile made for this model"
            )
        if self.tolerances is not None and len(self.tolerances) != num_layers:
            raise ProfileMismatch(
                f"there are tolerances for {len(self.tolerances)} layers, and the model has {num_layers}; "
                "use a profile made for this model"
            )


def is_papers_rule(policy: object) -> TypeGuard[SkipPolicy]:
    """Whether a policy is Algorithm 1 of the paper, which knows no tolerances."""
    return isinstance(policy, SkipPolicy) and policy.tolerances is None


def without_absent_tolerances(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a SkipPolicy; those of the paper's rule are as they were before there were tolerances."""
    return {name: value for name, value in fields.items() if name != "tolerances" or value is not None}
