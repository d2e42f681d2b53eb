"""What a request may say of skipping: all of it is read, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documents import document, tuned_document, write

from skipcal.errors import ConfigError, TargetOutOfReach
from skipcal.profiles.schema import SkipProfile
from skipcal.serving.plan import Plan, check_request
from skipcal.serving.requests import check_body, check_no_beams, check_scores, target_asked
from skipcal.serving.settings import ServingSettings, policy_of


def asking(extra: Any) -> Any:
    return SimpleNamespace(extra_args=extra)


@pytest.mark.parametrize(
    ("extra", "target"),
    [(None, None), ({}, None), ({"other": 0}, None), ({"skipcal": 1}, None), ({"skipcal": True}, None),
     ({"skipcal": 0}, 0.0), ({"skipcal": False}, 0.0), ({"skipcal": 0.0}, 0.0), ({"skipcal": 0.25}, 0.25),
     ({"skipcal": 0.999}, 0.999)],
)  # fmt: skip
def test_a_request_asks_for_the_engines_setting_the_full_model_or_a_target(extra: Any, target: Any) -> None:
    assert target_asked(asking(extra)) == target


@pytest.mark.parametrize(
    "asked", ["0", "0.4", "off", 2, -1, 1.0, 1.5, -0.1, float("nan"), None, [0.4], {"target_skip_ratio": 0.4}]
)
def test_a_request_that_says_anything_else_is_refused(asked: Any) -> None:
    with pytest.raises(
        ConfigError, match="expected a target skip ratio between 0 and 1, 0 for the full"
    ) as caught:
        target_asked(asking({"skipcal": asked}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["Skipcal", "skip_cal", "skipcal_target_skip_ratio", "skipcal-ratio", "target_skip_ratio"]
)
def test_a_key_of_nearly_the_name_is_not_passed_over(key: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"key '{key}' of a request is not known there; did you mean {{\"skipcal\""
    ):
        target_asked(asking({key: 0.4}))


@pytest.mark.parametrize("key", ["skipcal", "Skipcal", "target_skip_ratio", "targetSkipRatio"])
def test_a_key_beside_vllm_xargs_is_not_passed_over(key: str) -> None:
    check_body(["session_id", "other"])
    with pytest.raises(
        ConfigError, match=rf"key '{key}' .* did you mean \"vllm_xargs\": {{\"skipcal\": 0\.25}}"
    ):
        check_body(["other", key])


def plan(path: Path, profile: dict[str, Any] | None = None, **settings: Any) -> Plan:
    write(path, profile or document())
    found = ServingSettings(profile=str(path), **settings)
    loaded = SkipProfile.load(path)
    return Plan(found, loaded, policy_of(found, loaded))


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({}, 0.15, 0.2),
        ({"method": "ffn-skip", "warm_up_tokens": 4}, 0.15, 0.2),
        ({"method": "static"}, 0.2, 0.6),
    ],
)
@pytest.mark.parametrize("started", [None, 0.1, 0.2])
def test_the_policy_of_a_target_is_that_of_an_engine_started_with_it(
    settings: dict[str, Any], low: float, high: float, started: float | None, tmp_path: Path
) -> None:
    engine = plan(tmp_path / "p.json", target_skip_ratio=started, **settings)
    found = []
    for target in (low, high):
        check_request(engine, asking({"skipcal": target}))
        found.append(engine.policy_at(target))
        assert found[-1] == plan(tmp_path / "p.json", target_skip_ratio=target, **settings).policy
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("settings", "asked", "message"),
    [
        (
            {"method": "ffn-skip"},
            0.9,
            r"target skip ratio 0\.9 is out of reach: .* points from 0\.05 to 0\.2",
        ),
        ({"method": "ffn-skip"}, 0.01, r"0\.01 is out of reach"),
        ({"method": "static"}, 0.9, r"0\.9 is out of reach for static, which can skip 0\.750 at most"),
        ({"method": "full"}, 0.1, "started with the method 'full', which skips nothing"),
        ({}, 0.3, r"0\.3 is out of reach"),
        ({}, 25.0, r"of a request is 25\.0"),
    ],
)
def test_a_target_that_an_engine_does_not_reach_is_refused(
    settings: dict[str, Any], asked: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        check_request(plan(tmp_path / "p.json", **settings), asking({"skipcal": asked}))
    assert "\n" not in str(caught.value)


def test_a_fixed_set_of_ffns_has_no_target(tmp_path: Path) -> None:
    engine = plan(tmp_path / "p.json", tuned_document())
    check_request(engine, asking({"skipcal": 0}))
    with pytest.raises(TargetOutOfReach, match="policy is a fixed set of 1 FFNs"):
        check_request(engine, asking({"skipcal": 0.2}))


def test_a_target_where_nothing_is_skipped_is_refused() -> None:
    for harmless in (None, {}, {"skipcal": 0}, {"skipcal": 1}):
        check_request(None, asking(harmless))
    with pytest.raises(ConfigError, match=r"is 0\.4, but this engine was started without skipping; give it"):
        check_request(None, asking({"skipcal": 0.4}))


def test_a_beam_search_is_refused() -> None:
    class BeamSearchParams:
        beam_width = 2

    with pytest.raises(ConfigError, match="does not go with beam search"):
        check_no_beams(BeamSearchParams())
    check_no_beams(asking(None))


@pytest.mark.parametrize("extra", [None, {"skipcal": 1}])
def test_scores_of_a_prompt_are_refused_for_they_would_be_the_full_models(extra: Any) -> None:
    with pytest.raises(
        ConfigError, match="prompt_logprobs of a request that skips would be the full model's"
    ):
        check_scores(SimpleNamespace(extra_args=extra, prompt_logprobs=0))
    check_scores(SimpleNamespace(extra_args=extra, prompt_logprobs=None))
    check_scores(SimpleNamespace(extra_args={"skipcal": 0}, prompt_logprobs=5))
    check_scores(SimpleNamespace(pooling="params of a model that does not decode"))
