"""Policies refuse what no layer and no cosine can mean."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from skipcal.arch.locate import locate
from skipcal.core.policy import FULL_MODEL_THRESHOLD, SkipPolicy
from skipcal.errors import ConfigError, ProfileMismatch
from skipcal.runtime.engines.choice import engine_for

POLICY = SkipPolicy(cold_s=2, cold_e=10, threshold=0.9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": math.nan}, r"threshold nan is not within \[-1, 2\]"),
        ({"threshold": math.inf}, "threshold inf"),
        ({"threshold": -1.01}, r"threshold -1\.01"),
        ({"threshold": 98.0}, "not a percentage"),
        ({"cold_s": 11}, "cold_s 11 and cold_e 10 are no layer range"),
        ({"cold_s": -1}, "cold_s -1"),
        ({"warm_up_tokens": -1}, "warm_up_tokens -1 is negative"),
        ({"max_skips": -1}, "max_skips -1 is negative"),
        ({"tolerances": (1.0, 0.9)}, "tolerances .* are not all 1 or more"),
        ({"tolerances": (1.0, math.inf)}, "tolerances .* are not all 1 or more"),
        ({"rule": "entropy"}, "rule 'entropy' is not known"),
    ],
)
def test_values_out_of_range_are_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refused:
        replace(POLICY, **change)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("threshold", [-1.0, 0.0, 1.0, FULL_MODEL_THRESHOLD])
def test_the_ends_of_the_range_are_allowed(threshold: float) -> None:
    assert replace(POLICY, threshold=threshold).threshold == threshold


def test_the_smallest_values_are_allowed() -> None:
    least = replace(POLICY, cold_s=0, cold_e=0, warm_up_tokens=0, max_skips=0)
    assert least.to_dict() == {
        "cold_s": 0, "cold_e": 0, "threshold": 0.9, "warm_up_tokens": 0, "max_skips": 0, "rule": "cosine",
    }  # fmt: skip
    assert replace(POLICY, cold_s=10).most_skips() == 0


def test_what_is_left_out_is_the_papers_choice() -> None:
    assert (POLICY.warm_up_tokens, POLICY.max_skips, POLICY.rule, POLICY.unit) == (25, None, "cosine", "ffn")


@pytest.mark.parametrize(
    ("change", "method"),
    [
        ({}, "ffn-skip"),
        ({"threshold": 1.0}, "ffn-skip"),
        ({"threshold": 1.001}, "full"),
        ({"cold_s": 10}, "full"),
        ({"cold_s": 9}, "ffn-skip"),
    ],
)
def test_what_can_skip_nothing_is_called_full(change: dict[str, Any], method: str) -> None:
    assert replace(POLICY, **change).method == method


def test_the_rule_is_the_policys(tiny: Any) -> None:
    policy = SkipPolicy(cold_s=1, cold_e=3, threshold=0.7, max_skips=2)
    found = locate(tiny)
    for batch_rule in ("rows", "all"):
        engine: Any = engine_for(policy, found, "eager", batch_rule=batch_rule)
        rules: list[Any] = [policy.make_rule(batch_rule=batch_rule), engine._rule]
        for rule in rules:
            assert (rule.layers, rule.threshold, rule.max_skips) == (range(1, 3), 0.7, 2)
            assert rule.batch_rule == batch_rule
            assert (
                engine.reason == engine_for(policy, found, "eager").reason != engine_for(policy, found).reason
            )
    takes_over = "on a CPU recorded takes over after 100 decode steps of generate()"
    assert engine_for(policy, found).reason == takes_over
    default: Any = engine_for(policy, found)
    assert default._rule.batch_rule == "rows"


def test_a_skip_leaves_the_weights_of_its_block_unread(tiny: Any) -> None:
    for block in locate(tiny).blocks:
        assert POLICY.saved_bytes(block) == block.weight_bytes > 0


def test_the_first_ffn_of_the_region_always_runs() -> None:
    assert POLICY.most_skips() == 7
    assert replace(POLICY, max_skips=3).most_skips() == 3
    assert replace(POLICY, max_skips=30).most_skips() == 7
    assert replace(POLICY, cold_e=2).most_skips() == 0


def test_a_region_beyond_the_model_is_refused() -> None:
    POLICY.check_layers(10)
    with pytest.raises(ProfileMismatch, match="beyond the model's 9 layers"):
        POLICY.check_layers(9)


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        POLICY.threshold = 0.5  # type: ignore[misc]


def test_tolerances_of_another_number_of_layers_are_refused() -> None:
    policy = replace(POLICY, tolerances=(1.0,) * 12)
    policy.check_layers(12)
    with pytest.raises(ProfileMismatch, match="tolerances for 12 layers, and the model has 13"):
        policy.check_layers(13)
