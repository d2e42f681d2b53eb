"""What each request is judged by: the engine's own rule, or that of a target skip ratio of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from skipcal.core.policy import Policy
from skipcal.core.rule import Rule
from skipcal.errors import SessionError
from skipcal.serving.requests import FULL

# Targets whose rules are kept, for clients choose them and memory has to be bounded. A gate's rule is as
# large as its probes, 0.5 MB for a model of 7B. With more targets at a time, rules are made again.
KEPT = 64


@dataclass(frozen=True, eq=False)
class RequestRule:
    """What a request is judged by. A rule remembers nothing between passes, so requests may share it."""

    method: str
    rule: Rule
    warm_up_tokens: int

    @classmethod
    def of(cls, policy: Policy) -> RequestRule:
        """That of a policy."""
        return cls(policy.method, policy.make_rule(), policy.warm_up_tokens)


class TargetRules:
    """The rules of an engine, by target."""

    def __init__(self, policy: Policy, policy_at: Callable[[float], Policy] | None) -> None:
        """policy: of requests that say nothing; policy_at: of those with a target, None: there are none."""
        self._own = RequestRule.of(policy)
        self._policy_at = policy_at
        self._at = functools.lru_cache(KEPT)(self._make)

    def of(self, target: float | None) -> RequestRule:
        """The rule of a target. None is the engine's own, and FULL too: none is asked for its tokens."""
        return self._own if target is None or target == FULL else self._at(target)

    def _make(self, target: float) -> RequestRule:
        if self._policy_at is None:
            raise SessionError(f"a request has a target skip ratio of {target:g}, where none is served")
        return RequestRule.of(self._policy_at(target))
