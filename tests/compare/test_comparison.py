"""Profiles side by side: the numbers, the names, what is refused, and what is written."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import lively
from scipy.stats import spearmanr

from skipcal.arch.loading import LoadedModel
from skipcal.calibrate.pipeline import calibrate_model
from skipcal.compare.comparison import (
    CompareConfig,
    compare_profiles,
    curve_distances,
    load_profiles,
    run_compare,
)
from skipcal.configs.run import ProfileConfig
from skipcal.errors import ConfigError, OutputExists, ProfileMismatch, TargetOutOfReach, Unavailable
from skipcal.profiles.schema import SkipProfile

WRITTEN = ["compare.csv", "compare.json", "curves.png", "distances.csv"]
MATRICES = ["transfer.csv", "transfer_perplexity.png", "transfer_ratio.png"]


class Words:
    chat_template = None

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word[1:]) for word in text.split()]}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    tokenizer: Any = Words()
    with torch.no_grad():
        model = lively("llama", num_hidden_layers=8)
    return LoadedModel(model=model, tokenizer=tokenizer, name="org/lively", revision=None)


@pytest.fixture(scope="module")
def folder(loaded: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts a.txt and b.txt, and the profiles a.json and b.json that were made from them."""
    folder = tmp_path_factory.mktemp("study")
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        ids = torch.randint(3, 97, (900,), generator=generator).tolist()
        path = folder / f"{name}.txt"
        path.write_text(" ".join(f"w{n}" for n in ids))
        config = ProfileConfig(
            data_files=[str(path)], prompts=6, prompt_tokens=16, new_tokens=10, warm_up_tokens=2,
            max_skips=3,
        )  # fmt: skip
        with torch.no_grad():
            calibrate_model(loaded, config).profile.save(folder / f"{name}.json")
    return folder


@pytest.fixture
def profiles(folder: Path) -> dict[str, SkipProfile]:
    return load_profiles([str(folder / "a.json"), str(folder / "b.json")])


def settings(folder: Path, **changes: Any) -> CompareConfig:
    given: dict[str, Any] = {
        "data_files": [f"{folder}/a.txt", f"mine={folder}/b.txt"],
        "target_skip_ratio": 0.1, "prompts": 3, "prompt_tokens": 8, "text_tokens": 30,
    }  # fmt: skip
    return CompareConfig(**{**given, **changes})


def never() -> LoadedModel:
    raise AssertionError("the model is not needed")


# Profiles


def test_the_summary_says_what_the_profiles_say(profiles: dict[str, SkipProfile]) -> None:
    frame = compare_profiles(profiles, 0.1)
    assert frame["profile"].tolist() == ["a", "b"]
    for row, profile in zip(frame.to_dict(orient="records"), profiles.values(), strict=True):
        regions = profile.regions
        assert (row["cold_s"], row["cold_e"]) == (regions.cold_s, regions.cold_e)
        assert (row["cold_s_low"], row["cold_s_high"]) == regions.cold_s_interval
        assert (row["cold_e_low"], row["cold_e_high"]) == regions.cold_e_interval
        assert row["fit_r2"] == regions.fit_r2
        assert row["threshold"] == profile.cosine_policy_for(0.1).threshold
        point = next(p for p in profile.operating_points if p.target_skip_ratio == 0.1)
        assert row["realised_skip_ratio"] == point.realised_skip_ratio
        assert row["tokens"] == profile.calibration.corpora[0].tokens == 60


def test_a_profile_without_the_target_keeps_its_row(
    profiles: dict[str, SkipProfile], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        frame = compare_profiles(profiles, 0.9)
    assert frame["threshold"].isna().all()
    assert "profile 'a' has no operating point for a skip ratio of 0.9" in caplog.text


def test_distances_of_curves_are_the_largest_gap_and_the_rank_correlation(
    profiles: dict[str, SkipProfile],
) -> None:
    frame = curve_distances({**profiles, "again": profiles["a"]})
    assert list(zip(frame["first"], frame["second"], strict=True)) == [
        ("a", "b"), ("a", "again"), ("b", "again")
    ]  # fmt: skip
    a, b = (np.array(profile.layers["pooled"].mean) for profile in profiles.values())
    first = frame.iloc[0]
    assert first["max_difference"] == abs(a - b).max() > 0
    assert first["at_layer"] == abs(a - b).argmax()
    assert first["spearman"] == pytest.approx(spearmanr(a, b).statistic)
    assert frame.iloc[1][["max_difference", "spearman"]].tolist() == pytest.approx([0, 1])
    assert curve_distances({"a": profiles["a"]}).empty


def test_profiles_of_different_models_are_refused(profiles: dict[str, SkipProfile]) -> None:
    def changed(**values: Any) -> dict[str, SkipProfile]:
        model = profiles["b"].model.model_copy(update=values)
        return {**profiles, "b": profiles["b"].model_copy(update={"model": model})}

    with pytest.raises(ProfileMismatch, match=r"'a' is of org/lively \(8 layers\), 'b' of org/other"):
        compare_profiles(changed(name="org/other", fingerprint="0"), 0.1)
    with pytest.raises(ProfileMismatch, match="compare profiles of one model"):
        compare_profiles(changed(hidden_size=64), 0.1)
    with pytest.raises(ProfileMismatch, match="compare profiles of one model"):
        compare_profiles({"s": SkipProfile.load("smollm2-135m-instruct"), **profiles}, 0.1)
    compare_profiles(changed(name="a-folder"), 0.1)  # the same weights
    compare_profiles(changed(fingerprint="0", dtype="bfloat16"), 0.1)  # not comparable


def test_other_weights_of_one_name_are_worth_a_warning(
    profiles: dict[str, SkipProfile], caplog: pytest.LogCaptureFixture
) -> None:
    model = profiles["b"].model.model_copy(update={"fingerprint": "0"})
    with caplog.at_level(logging.WARNING):
        compare_profiles({**profiles, "b": profiles["b"].model_copy(update={"model": model})}, 0.1)
    assert "profiles 'a' and 'b' are of different weights of org/lively" in caplog.text


def test_names_are_stems_told_apart_by_folders(folder: Path, tmp_path: Path) -> None:
    text = (folder / "a.json").read_text()
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "skip_profile.json").write_text(text)
    found = load_profiles([str(tmp_path / p / "skip_profile.json") for p in ("one", "two")])
    assert list(found) == ["one/skip_profile", "two/skip_profile"]
    assert list(load_profiles(["smollm2-135m-instruct"])) == ["smollm2-135m-instruct"]
    with pytest.raises(ConfigError, match="two profiles would be called"):
        load_profiles([str(folder / "a.json")] * 2)
    with pytest.raises(Unavailable, match="no file and no shipped profile"):
        load_profiles([str(folder / "none.json")])


# The whole


def test_profiles_alone_need_no_model_and_no_text(folder: Path, tmp_path: Path) -> None:
    result = run_compare([f"{folder}/a.json", f"{folder}/b.json"], CompareConfig(), never)
    assert result.transfer is None
    assert result.to_dict()["transfer"] is None
    assert "curves, pair by pair" in result.to_text()
    assert "perplexity" not in result.to_text()
    result.save(tmp_path / "out", overwrite=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN


def test_with_text_each_profile_is_used_on_each_text(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    result = run_compare([f"{folder}/a.json", f"{folder}/b.json"], settings(folder), lambda: loaded)
    assert result.transfer is not None
    pairs = result.transfer[["profile", "text"]].to_numpy().tolist()
    assert pairs == [["a", "a"], ["b", "a"], ["a", "mine"], ["b", "mine"]]
    document = result.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["config"]["data_files"] == ["a.txt", "mine=b.txt"]
    assert [(t["name"], t["source"], t["rows"], t["tokens"]) for t in document["texts"]] == [
        ("a", "a.txt", 3, 90),
        ("mine", "b.txt", 3, 90),
    ]
    assert str(folder) not in json.dumps(document)
    assert "full model" in result.to_text()
    assert max(map(len, result.to_text().splitlines())) <= 80
    out = tmp_path / "out"
    assert sorted(result.save(out, overwrite=False)) == sorted(out.iterdir())
    assert sorted(path.name for path in out.iterdir()) == sorted(WRITTEN + MATRICES)
    pd.testing.assert_frame_equal(pd.read_csv(out / "transfer.csv"), result.transfer)
    pd.testing.assert_frame_equal(pd.read_csv(out / "compare.csv"), result.summary)
    assert json.loads((out / "compare.json").read_text()) == document


def test_one_profile_can_be_used_on_text(folder: Path, loaded: LoadedModel) -> None:
    result = run_compare([f"{folder}/a.json"], settings(folder), lambda: loaded)
    assert result.distances.empty
    assert result.transfer is not None
    assert len(result.transfer) == 2
    with pytest.raises(ConfigError, match="1 profile and no text leave nothing to compare"):
        run_compare([f"{folder}/a.json"], CompareConfig(), never)
    with pytest.raises(ConfigError, match="0 profile"):
        run_compare([], CompareConfig(), never)


def test_a_profile_without_the_target_is_left_out_of_the_transfer(
    folder: Path, loaded: LoadedModel, tmp_path: Path
) -> None:
    narrow = SkipProfile.load(folder / "b.json")
    points = [point for point in narrow.operating_points if point.target_skip_ratio < 0.1]
    narrow.model_copy(update={"operating_points": points}).save(tmp_path / "narrow.json")
    sources = [f"{folder}/a.json", f"{tmp_path}/narrow.json"]
    result = run_compare(sources, settings(folder), lambda: loaded)
    assert result.transfer is not None
    assert set(result.transfer["profile"]) == {"a"}
    assert "Without an operating point for the target: narrow." in result.to_text()
    assert result.to_dict()["profiles"][1]["threshold"] is None
    result.save(tmp_path / "out", overwrite=False)


def test_nothing_is_overwritten_unasked_and_nothing_half_written(folder: Path, tmp_path: Path) -> None:
    result = run_compare([f"{folder}/a.json", f"{folder}/b.json"], CompareConfig(), never)
    (tmp_path / "distances.csv").write_text("mine")
    with pytest.raises(OutputExists, match=r"distances\.csv exists already"):
        result.save(tmp_path, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["distances.csv"]
    result.save(tmp_path, overwrite=True)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result.save(tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_tokens": 11}, ConfigError, "--text-tokens 11 leaves no token past .* expected 12 or more"),
        ({"target_skip_ratio": 0.9}, TargetOutOfReach, "profile 'a': target skip ratio 0.9 is out of reach"),
        ({"corpus": ["gsm8k:few"]}, ConfigError, "'few' is no format"),
    ],
)
def test_what_must_fail_fails_before_the_model_is_loaded(
    folder: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run_compare([f"{folder}/a.json", f"{folder}/b.json"], settings(folder, **changes), never)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": 0}, "--prompts 0 cannot be used: expected 1 or more"),
        ({"prompt_tokens": 0}, "--prompt-tokens 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"seed": -1}, "--seed -1"),
        ({"target_skip_ratio": 25}, "--target-skip-ratio 25 cannot be used: expected a fraction"),
        ({"target_skip_ratio": math.nan}, "--target-skip-ratio nan"),
    ],
)
def test_settings_out_of_range_are_refused_as_they_are_typed(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompareConfig(**changes)
