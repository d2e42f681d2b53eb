"""What each request is judged by: the engine's own rule, or that of a target skip ratio of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from skipcal.core.host import PlacedBlock
from skipcal.core.policy import Policy
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.errors import SessionError
from skipcal.serving.requests import FULL

# Targets whose rules are kept, for clients choose them and memory has to be bounded. A gate's rule is as
# large as its probes, 0.5 MB for a model of 7B. With more targets at a time, rules are made again.
KEPT = 64


@dataclass(frozen=True, eq=False)
class RequestRule:
    """What a request is judged by. A rule remembers nothing between passes, so requests may share it.

    surrogates: what stands in for what it skips, where its layers compute.
    """

    method: str
    rule: Rule
    surrogates: Surrogates
    warm_up_tokens: int


class TargetRules:
    """The rules of an engine, by target."""

    def __init__(
        self, policy: Policy, policy_at: Callable[[float], Policy] | None, blocks: Sequence[PlacedBlock]
    ) -> None:
        """policy: of requests that say nothing; policy_at: of those with a target, None: there are none."""
        self._policy_at = policy_at
        self._placed = functools.lru_cache(KEPT)(lambda given: given.surrogates.for_blocks(blocks))
        self._own = self._rule(policy)
        self._at = functools.lru_cache(KEPT)(self._make)

    def of(self, target: float | None) -> RequestRule:
        """The rule of a target. None is the engine's own, and FULL too: none is asked for its tokens."""
        return self._own if target is None or target == FULL else self._at(target)

    def _make(self, target: float) -> RequestRule:
        if self._policy_at is None:
            raise SessionError(f"a request has a target skip ratio of {target:g}, where none is served")
        return self._rule(self._policy_at(target))

    def _rule(self, policy: Policy) -> RequestRule:
        given: Surrogates = getattr(policy, "surrogates", NONE)
        return RequestRule(
            policy.method, policy.make_rule(), self._placed(_ByIdentity(given)), policy.warm_up_tokens
        )


NONE = Surrogates({})


@dataclass(frozen=True, eq=False)
class _ByIdentity:
    """Targets of a gate share its surrogates, which are placed once."""

    surrogates: Surrogates

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.surrogates is self.surrogates

    def __hash__(self) -> int:
        return id(self.surrogates)
