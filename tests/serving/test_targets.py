"""Rules by target: made once, and no more are kept than is said."""

from __future__ import annotations

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import Policy
from skipcal.serving.targets import KEPT, TargetRules

OWN = ChosenFFNs(method="static", layers=(1,), probability=1.0, warm_up_tokens=2)


def test_a_rule_is_made_once_for_each_target_and_the_oldest_are_forgotten() -> None:
    made: list[float] = []

    def policy_at(target: float) -> Policy:
        made.append(target)
        return ChosenFFNs(method="static", layers=(1, 2), probability=1.0, warm_up_tokens=3)

    rules = TargetRules(OWN, policy_at, ())
    targets = [n / 1000 for n in range(1, KEPT + 2)]
    first = [rules.of(target) for target in targets]
    assert made == targets
    assert all(rules.of(target) is rule for target, rule in zip(targets[1:], first[1:], strict=True))
    assert made == targets
    again = rules.of(targets[0])
    assert again is not first[0] and again.warm_up_tokens == 3
    assert made == [*targets, targets[0]]


def test_requests_without_a_target_have_the_engines_own_rule() -> None:
    rules = TargetRules(OWN, None, ())
    assert rules.of(None) is rules.of(0.0)
    assert rules.of(None).warm_up_tokens == 2
    assert rules.of(None).rule.layers == {1}
