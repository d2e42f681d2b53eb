"""The profile: round trips, precise refusals, operating points, the check against a model."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from documents import LAYERS, document, write

from skipcal.arch.check import tiny_model
from skipcal.arch.loading import fingerprint
from skipcal.core.policy import SkipPolicy
from skipcal.errors import (
    ConfigError,
    OutputExists,
    ProfileError,
    ProfileMismatch,
    TargetOutOfReach,
)
from skipcal.files.writing import dump_json
from skipcal.profiles.methods import Ask, make_policy, recommended_ratio
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles
from skipcal.profiles.summary import summarize


@pytest.fixture
def profile(tmp_path: Path) -> SkipProfile:
    return SkipProfile.load(write(tmp_path / "valid.json", document()))


def test_a_profile_round_trips_byte_for_byte(tmp_path: Path, profile: SkipProfile) -> None:
    path = tmp_path / "a.json"
    profile.save(path)
    text = path.read_text()
    assert text.endswith("}\n")
    assert text == dump_json(json.loads(text))  # sorted keys
    again = SkipProfile.load(path)
    assert again == profile
    assert again.to_json() == text
    assert json.loads(text) == document()


@pytest.mark.parametrize("name", shipped_profiles())
def test_every_shipped_profile_loads_and_is_canonical(name: str) -> None:
    shipped = SkipProfile.load(name)
    path = Path(__file__).resolve().parents[2] / "profiles" / f"{name}.json"
    assert shipped.to_json() == path.read_text(encoding="utf-8")
    assert shipped.model.num_layers == len(shipped.layers["pooled"].mean)
    ratios = [point.target_skip_ratio for point in shipped.operating_points]
    assert ratios == sorted(ratios)


def test_nothing_is_overwritten_unasked(tmp_path: Path, profile: SkipProfile) -> None:
    path = tmp_path / "a.json"
    path.write_text("mine")
    with pytest.raises(OutputExists, match="--overwrite"):
        profile.save(path)
    assert path.read_text() == "mine"
    profile.save(path, overwrite=True)
    assert SkipProfile.load(path) == profile


def test_unknown_top_level_keys_are_kept_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = write(tmp_path / "newer.json", document(pareto=[{"kl": 0.1}]))
    with caplog.at_level(logging.WARNING):
        loaded = SkipProfile.load(newer)
    assert "['pareto']" in caplog.text
    assert json.loads(loaded.to_json())["pareto"] == [{"kl": 0.1}]


def changed(path: str, value: Any) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(document()))
    *parents, last = path.split(".")
    place: Any = result
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format", "skipcal.profile/2", "format is 'skipcal.profile/2', expected 'skipcal.profile/1'"),
        ("format", ..., "format is None"),
        ("model", ..., "model: Field required"),
        ("model.num_layers", "4", r"model\.num_layers: .*valid integer, got '4'"),
        ("model.num_layers", 0, r"model\.num_layers: .*greater than or equal to 1"),
        ("model.num_layers", 5, r"layers\.pooled: expected 5 entries \(model\.num_layers\), got 4"),
        ("policy.threshold", 98.0, r"policy: threshold 98\.0 is not within"),
        ("policy.threshold", None, r"policy\.threshold"),
        ("policy.treshold", 0.9, r"policy\.treshold: "),
        (
            "policy.rule",
            "magic",
            r"policy: rule is not known, expected 'cosine', 'gate' or .*magic",
        ),
        ("policy.cold_e", 0, "policy: cold_s 1 and cold_e 0 are no layer range"),
        ("policy.cold_e", 9, r"policy\.cold_e: expected at most 4 .*, got 9"),
        ("layers.pooled", ..., "layers: expected an entry 'pooled'"),
        ("layers.pooled.mean", [0.5] * 3, "expected lists of one length"),
        ("layers.pooled.mean.1", 1.5, r"layers\.pooled\.mean\.1: .*less than or equal to 1, got 1\.5"),
        ("layers.pooled.histogram.0", [10], "expected 200 bins"),
        ("operating_points.1.threshold", "high", r"operating_points\.1\.threshold"),
        ("operating_points.0.target_skip_ratio", 25, r"operating_points\.0\.target_skip_ratio"),
        ("calibration.mode", "train", r"calibration\.mode"),
        ("regions.surprise", 1, r"regions\.surprise: Extra inputs"),
    ],
)
def test_a_malformed_profile_names_field_value_and_expectation(
    tmp_path: Path, path: str, value: Any, message: str
) -> None:
    file = write(tmp_path / "bad.json", changed(path, value))
    with pytest.raises(ProfileError, match=message) as refused:
        SkipProfile.load(file)
    assert str(file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "7", '"profile"', "\ufeff{}", "{'a': 1}", "[" * 100_000,
        json.dumps(document())[:-30], json.dumps(document()).replace("0.9", "NaN"),
        json.dumps(document()).replace("0.9", "1e999"),
    ],
)  # fmt: skip
def test_text_that_is_no_profile_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(ProfileError) as refused:
        SkipProfile.load(write(tmp_path / "bad.json", text))
    assert "\n" not in str(refused.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ProfileError, match="no valid JSON"):
        SkipProfile.load(tmp_path / "bad.json")


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("skipcal.files.reading.MAX_PROFILE_BYTES", 100)
    with pytest.raises(ProfileError, match="larger than"):
        SkipProfile.load(write(tmp_path / "big.json", document()))


# Operating points


def test_targets_choose_and_interpolate_thresholds(profile: SkipProfile) -> None:
    assert profile.cosine_policy_for() == profile.policy
    assert profile.cosine_policy_for(0.1).threshold == 0.9
    assert profile.cosine_policy_for(0.15).threshold == pytest.approx(0.85)
    assert profile.cosine_policy_for(0.075).threshold == pytest.approx(0.925)
    assert profile.cosine_policy_for(0.0).threshold > 1  # the full model


@pytest.mark.parametrize("target", [0.04, 0.21, 1.0])
def test_targets_beyond_the_points_are_refused(profile: SkipProfile, target: float) -> None:
    with pytest.raises(TargetOutOfReach, match=r"from 0\.05 to 0\.2"):
        profile.policy_for(target)


@pytest.mark.parametrize("target", [-0.1, 25.0, math.nan])
def test_targets_that_are_no_fractions_are_refused(profile: SkipProfile, target: float) -> None:
    with pytest.raises(ConfigError, match="not a percentage"):
        profile.policy_for(target)


# Models


def test_another_shape_is_an_error_and_other_weights_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    own = changed("model.fingerprint", fingerprint(model))
    with caplog.at_level(logging.WARNING):
        SkipProfile.load(write(tmp_path / "own.json", own)).check_fits(model)
    assert caplog.text == ""
    with caplog.at_level(logging.WARNING):
        SkipProfile.load(write(tmp_path / "other.json", document())).check_fits(model)
    assert "other weights" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        SkipProfile.load(write(tmp_path / "half.json", changed("model.dtype", "bfloat16"))).check_fits(model)
    assert "made in bfloat16, the model runs in float32" in caplog.text
    for path, value, message in [
        ("model.hidden_size", 64, "hidden size 64, the model's is 32"),
        ("model.model_type", "gemma2", "model type 'gemma2', the model's is 'llama'"),
    ]:
        other = SkipProfile.load(write(tmp_path / "foreign.json", changed(path, value)))
        with pytest.raises(ProfileMismatch, match=message):
            other.check_fits(model)


# Frames


def test_the_frame_is_long_and_complete(profile: SkipProfile) -> None:
    frame = profile.to_frame()
    assert list(frame.columns) == ["corpus", "layer", "part", "stat", "value", "n"]
    assert len(frame) == LAYERS * 10
    assert set(frame["part"]) == {"generated"}
    assert frame[(frame.stat == "std") & (frame.layer == 2)].value.item() == 0.1


def test_a_profile_that_an_editor_marked_is_the_same_profile(tmp_path: Path) -> None:
    shipped = SkipProfile.load("smollm2-135m-instruct")
    path = tmp_path / "marked.json"
    path.write_bytes(b"\xef\xbb\xbf" + shipped.to_json().encode())
    marked = SkipProfile.load(path)
    assert marked.to_json() == shipped.to_json()


def by_damage(**changes: Any) -> dict[str, Any]:
    """A document with a rule by damage."""
    policy = {
        "cold_s": 1,
        "cold_e": LAYERS - 1,
        "threshold": 2.0,
        "max_skips": 2,
        "tolerances": [1.5] * LAYERS,
    }
    points = [
        {
            "target_skip_ratio": at,
            "threshold": threshold,
            "predicted_skip_ratio": at,
            "realised_skip_ratio": at,
        }
        for at, threshold in ((0.1, 0.99), (0.2, 0.98))
    ]
    rule = {"excess_nll": [0.5] * LAYERS, "tokens": 7, "policy": policy, "operating_points": points}
    return {**document(), "damage_rule": {**rule, **changes}}


def test_a_rule_by_damage_has_thresholds_of_its_own(tmp_path: Path, profile: SkipProfile) -> None:
    found = SkipProfile.load(write(tmp_path / "by-damage.json", by_damage()))
    assert found.damage_policy(0.1).threshold == 0.99
    assert found.damage_policy(0.15).threshold == pytest.approx(0.985)
    assert found.damage_policy(0).method == "full"
    assert found.policy_for(None) == profile.policy_for(None)
    with pytest.raises(TargetOutOfReach):
        found.damage_policy(0.3)
    with pytest.raises(ConfigError, match="--by-damage"):
        profile.damage_policy(0.1)


def weighed(tolerances: list[float] | None = None, **changes: Any) -> dict[str, Any]:
    """A document whose policy is that rule, as a search leaves it."""
    found = by_damage()
    policy = {**found["damage_rule"]["policy"], "threshold": 0.98, "warm_up_tokens": 3}
    policy["tolerances"] = tolerances or policy["tolerances"]
    found |= {"paper_policy": found["policy"], "policy": policy, **changes}
    return {name: value for name, value in found.items() if value is not None}


def test_a_rule_by_damage_may_be_the_policy(tmp_path: Path, profile: SkipProfile) -> None:
    found = SkipProfile.load(write(tmp_path / "weighed.json", weighed()))
    policy = found.policy_for()
    assert isinstance(policy, SkipPolicy) and policy.method == "ffn-skip+damage"
    assert (policy.threshold, policy.warm_up_tokens) == (0.98, 3)
    assert found.policy_for(0.1) == replace(policy, threshold=0.99)
    assert found.policy_for(0).method == "full"
    assert found.cosine_policy == profile.cosine_policy
    assert make_policy("ffn-skip", found, Ask(target_skip_ratio=0.1, new_tokens=9)).method == "ffn-skip"
    assert recommended_ratio(found) == 0.2
    marked = [line for line in summarize(found).splitlines() if "<- policy" in line]
    assert [line.split()[:2] for line in marked] == [["0.20", "0.980000"]]
    assert SkipProfile.load(write(tmp_path / "again.json", json.loads(found.to_json()))) == found


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (by_damage(excess_nll=[0.5]), "damage_rule.excess_nll: expected"),
        (by_damage(policy={"cold_s": 0, "cold_e": 1, "threshold": 1.0}), "damage_rule.policy: expected"),
        (by_damage(tokens=0), "damage_rule.tokens"),
        (weighed(damage_rule=None), "damage_rule: expected an entry beside a policy with tolerances"),
        (weighed(paper_policy=None), "paper_policy: expected an entry"),
        (weighed(tolerances=[1.0]), "policy.tolerances: expected"),
        (
            {**by_damage(), "paper_policy": {**by_damage()["damage_rule"]["policy"]}},
            "paper_policy.tolerances",
        ),
    ],
)
def test_a_rule_by_damage_that_does_not_fit_is_refused(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProfileError, match=message):
        SkipProfile.load(write(tmp_path / "wrong.json", changed))
