"""What additional_config may say: all of it is read, and nothing else is accepted."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from documents import document, gate_document, write

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.policy import SkipPolicy
from skipcal.errors import ConfigError, ProfileError, TargetOutOfReach, Unavailable
from skipcal.profiles.schema import SkipProfile
from skipcal.serving.settings import SERVED, ServingSettings, policy_of, settings_of


@pytest.mark.parametrize("config", [{}, None, {"other": {"profile": "x"}}, SimpleNamespace()])
def test_without_the_key_nothing_is_asked_for(config: Any) -> None:
    assert settings_of(config) is None


def test_every_setting_is_read() -> None:
    given: dict[str, Any] = {
        "profile": "p.json", "method": "gate", "target_skip_ratio": 0.3, "warm_up_tokens": 4,
        "prefix_caching": "share",
    }  # fmt: skip
    assert settings_of({"skipcal": given}) == ServingSettings(**given)
    assert set(given) == set(ServingSettings.model_fields)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profil": "x"}, r"key 'profil' is not known .* did you mean 'profile'\?"),
        ({"profile": "x", "ratio": 0.2}, "key 'ratio' is not known"),
        ({}, "profile: Field required"),
        ("smollm2", r"expected an object such as .*got 'smollm2'"),
        (True, "expected an object"),
        (None, "expected an object"),
        ({"profile": 3}, "profile: Input should be a valid string, got 3"),
        ({"profile": "x", "target_skip_ratio": "0.3"}, "target_skip_ratio: .*number, got '0.3'"),
        ({"profile": "x", "target_skip_ratio": 25}, "target_skip_ratio: .*less than or equal to 1, got 25"),
        ({"profile": "x", "target_skip_ratio": float("nan")}, "target_skip_ratio: .*finite"),
        ({"profile": "x", "method": "gate", "warm_up_tokens": -1}, "warm_up_tokens: .*got -1"),
        ({"profile": "x", "warm_up_tokens": 3}, "warm_up_tokens goes with a method; name one of full,"),
        ({"profile": "x", "prefix_caching": "yes"}, "prefix_caching: .*'share', got 'yes'"),
        ({"profile": "x", "method": "gates"}, r"method 'gates' is not known .* did you mean 'gate'\?"),
        ({"profile": "x", "method": "shortgpt"}, "method 'shortgpt' is not served; those that are: full,"),
        ({"profile": "x", "method": "random"}, "method 'random' is not served"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_in_one_line(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        settings_of({"skipcal": given})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["Skipcal", "skip_cal", "skip-cal", "SKIPCAL"])
def test_a_key_of_nearly_the_name_is_not_passed_over(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"has a key '{key}'; did you mean 'skipcal'\?"):
        settings_of({key: {"profile": "x"}})


def policy(path: Path, **settings: Any) -> Any:
    found = settings_of({"skipcal": {"profile": str(path), **settings}})
    assert found is not None
    return policy_of(found, SkipProfile.load(found.profile))


def test_each_method_is_a_policy_of_the_profile(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", document())
    assert policy(path, method="full").method == "full"
    assert policy(path, method="ffn-skip", target_skip_ratio=0.2).threshold == 0.8
    assert policy(path, method="ffn-skip", warm_up_tokens=2).warm_up_tokens == 2
    assert policy(path) == policy(path, method="ffn-skip") == SkipProfile.load(path).policy
    static = policy(path, method="static", target_skip_ratio=0.5)
    assert isinstance(static, ChosenFFNs) and len(static.layers) == 2
    assert isinstance(policy(path, target_skip_ratio=0.05), SkipPolicy)


@pytest.mark.parametrize("method", SERVED)
def test_a_method_without_what_it_needs_is_refused(method: str, tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", document())
    if method in ("gate", "static+surrogates"):
        with pytest.raises(ConfigError, match="this profile has no gate; fit one with: skipcal fit"):
            policy(path, method=method, target_skip_ratio=0.2)
    elif method == "static+fitted":
        with pytest.raises(ConfigError, match="this profile has no fitted sets; fit some with: skipcal fit"):
            policy(path, method=method, target_skip_ratio=0.2)
    elif method == "ffn-skip+damage":
        with pytest.raises(ConfigError, match="make it again with: skipcal profile --by-damage"):
            policy(path, method=method, target_skip_ratio=0.2)
    elif method != "full":
        with pytest.raises(TargetOutOfReach, match=r"target skip ratio 0\.9 is out of reach"):
            policy(path, method=method, target_skip_ratio=0.9)


def test_a_gate_without_its_tensors_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "p.json", gate_document())
    with pytest.raises(Unavailable, match="gate and surrogates of the profile, cannot be read"):
        policy(path, method="gate", target_skip_ratio=0.2)


def test_a_profile_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no file"):
        policy(tmp_path / "missing.json")
    with pytest.raises(ProfileError, match="is not a profile"):
        policy(write(tmp_path / "other.json", {"format": "other"}))
