"""Sweeps: the table, resuming, and that records of different settings never mix."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from skipcal.arch.loading import LoadedModel
from skipcal.configs.sweep import SweepConfig
from skipcal.errors import ConfigError, ProfileMismatch, TargetOutOfReach
from skipcal.evaluation.records import RecordFile
from skipcal.evaluation.statistics import Share, difference, estimate
from skipcal.evaluation.sweep import COLUMNS, plan, run_sweep
from skipcal.evaluation.tasks.task import ALL
from skipcal.plots.sweep import save_sweep_figures
from skipcal.profiles.schema import SkipProfile
from skipcal.report.sweep import begin_folder, sweep_settings, tables, write_results

ALL_METHODS = ["ffn-skip", "random", "no-input-adaptive", "static", "shortgpt", "skipdecode"]


def settings(text_file: Path, questions: Path, **changes: Any) -> SweepConfig:
    values: dict[str, Any] = {
        "profile": "tiny.json",
        "methods": ["ffn-skip", "random"],
        "ratios": [0.25],
        "tasks": {
            "perplexity": {
                "data_files": [str(text_file)],
                "windows": 3,
                "window_tokens": 32,
                "warm_up_tokens": 3,
            },
            "freebaseqa": {"data_file": str(questions), "new_tokens": 10},
        },
        "batch_size": 2,
    }
    return SweepConfig.model_validate({**values, **changes})


@pytest.fixture
def config(text_file: Path, questions: Path) -> SweepConfig:
    return settings(text_file, questions)


def test_the_table_has_every_method_ratio_task_and_metric(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(text_file, questions, methods=ALL_METHODS, ratios=[0.125, 0.25])
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    assert list(frame.columns) == list(COLUMNS)
    arms = frame[["method", "target_skip_ratio", "task"]].drop_duplicates()
    assert len(arms) == (1 + 6 * 2) * 2
    assert not frame.duplicated(["method", "target_skip_ratio", "task", "subset", "metric"]).any()
    skipping = frame[frame["method"] != "full"]
    assert (skipping["realised_skip_ratio"] > 0).all()
    exact = skipping[skipping["method"].isin(["static", "shortgpt"])]
    assert (exact["realised_skip_ratio"] == exact["target_skip_ratio"]).all()
    whole = frame[frame["unit"] == "layer"]
    assert set(whole["method"]) == {"shortgpt", "skipdecode"}
    assert (abs(whole["skip_ratio_bytes"] - whole["realised_skip_ratio"]) < 1e-9).all()
    ffns = skipping[skipping["unit"] == "ffn"]
    assert (ffns["skip_ratio_bytes"] < ffns["realised_skip_ratio"]).all()
    full = frame[frame["method"] == "full"]
    assert (full["realised_skip_ratio"] == 0).all() and full["difference"].isna().all()
    assert (frame["ci_low"] <= frame["value"]).all() and (frame["value"] <= frame["ci_high"]).all()


def test_values_are_those_of_the_records(
    loaded: LoadedModel, profile: SkipProfile, config: SweepConfig, tmp_path: Path
) -> None:
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    read = {}
    for path in (tmp_path / "records" / "perplexity").iterdir():
        header, *records = map(json.loads, path.read_text().splitlines())
        read[header["method"]] = records
    shares = {m: [Share(r["nll"], r["tokens"]) for r in rows] for m, rows in read.items()}
    row = frame[
        (frame["method"] == "random") & (frame["metric"] == "perplexity") & (frame["subset"] == ALL)
    ].iloc[0]
    assert row["value"] == pytest.approx(
        math.exp(sum(r["nll"] for r in read["random"]) / sum(r["tokens"] for r in read["random"]))
    )
    assert row["value"] == estimate(shares["random"], "exp").value
    apart = difference(shares["random"], shares["full"], "exp")
    assert (row["difference"], row["difference_ci_low"]) == (apart.value, apart.ci_low)
    blocks = sum(sum(r["report"]["skipped_per_layer"]) / r["batch"] for r in read["random"])
    steps = sum(r["report"]["decode_steps_after_warm_up"] / r["batch"] for r in read["random"])
    assert row["realised_skip_ratio"] == pytest.approx(blocks / (8 * steps))
    assert steps == 3 * (32 - 1 - 3)


def test_an_interrupted_sweep_goes_on_and_gives_the_same(
    loaded: LoadedModel,
    profile: SkipProfile,
    config: SweepConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = run_sweep(loaded, profile, config, tmp_path / "whole").frame
    batches = 0
    original = RecordFile.append

    def interrupted(self: Any, *records: Any) -> None:
        nonlocal batches
        batches += 1
        if batches == 7:
            raise KeyboardInterrupt
        original(self, *records)

    with monkeypatch.context() as patch:
        patch.setattr(RecordFile, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(loaded, profile, config, tmp_path / "cut")
    made = {p: p.read_text() for p in (tmp_path / "cut").rglob("*.jsonl")}
    again = run_sweep(loaded, profile, config, tmp_path / "cut").frame
    for path, text in made.items():
        assert path.read_text().startswith(text)  # nothing was made twice
    compared = ["method", "task", "metric", "subset", "value", "realised_skip_ratio"]
    assert again[compared].equals(whole[compared])


def test_a_finished_sweep_runs_nothing(
    loaded: LoadedModel,
    profile: SkipProfile,
    config: SweepConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = run_sweep(loaded, profile, config, tmp_path).frame
    monkeypatch.setattr(type(loaded.model), "generate", None)
    assert run_sweep(loaded, profile, config, tmp_path).frame.equals(first)


def test_other_settings_have_other_records(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    one = run_sweep(loaded, profile, settings(text_file, questions), tmp_path).frame
    two = run_sweep(loaded, profile, settings(text_file, questions, seed=1), tmp_path).frame
    fresh = run_sweep(loaded, profile, settings(text_file, questions, seed=1), tmp_path / "fresh").frame
    assert two.equals(fresh)
    random = (one["method"] == "random") & (one["metric"] == "kl")
    assert not one[random]["value"].equals(two[random]["value"])


def test_matched_thresholds_realise_the_target(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(
        text_file, questions, methods=["ffn-skip"], ratios=[0.2, 0.4],
        tasks={"perplexity": {"data_files": [str(text_file)], "windows": 6, "window_tokens": 60,
                              "warm_up_tokens": 3, "match_items": 6}},
    )  # fmt: skip
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    skipped = frame[(frame["method"] == "ffn-skip") & (frame["metric"] == "kl") & (frame["subset"] == ALL)]
    assert skipped["realised_skip_ratio"].tolist() == pytest.approx([0.2, 0.4], abs=0.02)
    first, second = skipped["threshold"]
    assert first > second


def test_warm_ups_are_an_axis_of_the_table(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(text_file, questions, methods=["ffn-skip"], warm_ups=[0, 4])
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    rows = frame[(frame["method"] == "ffn-skip") & (frame["metric"] == "token_agreement")]
    assert rows["warm_up_tokens"].tolist() == [0, 4]
    assert rows["skip_ratio_all"].iloc[0] > rows["skip_ratio_all"].iloc[1]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"methods": ["ramdom"]}, ConfigError, "did you mean 'random'"),
        ({"ratios": [0.99], "methods": ["static"]}, TargetOutOfReach, "out of reach for static"),
        ({"ratios": [0.99]}, TargetOutOfReach, "out of reach"),
    ],
)
def test_what_an_arm_cannot_do_is_refused_before_anything_runs(
    profile: SkipProfile, text_file: Path, questions: Path, changes: dict[str, Any], error: type, message: str
) -> None:
    with pytest.raises(error, match=message):
        plan(profile, settings(text_file, questions, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["random", "random"]}, "method 'random' is asked for twice"),
        ({"ratios": [0.1, 0.1]}, "ratio 0.1 is asked for twice"),
        ({"tasks": {}}, "no task is asked for"),
        ({"warm_ups": [9]}, "none of 10 new tokens lies past the warm-up of 9"),
        (
            {"tasks": {"perplexity": {"window_tokens": 20, "warm_up_tokens": 18}}},
            "a window of 20 tokens has none past",
        ),
        ({"ratios": None, "tasks": {"freebaseqa": {"match_items": 3}}}, "give ratios too"),
        ({"methods": ["random"], "tasks": {"freebaseqa": {"match_items": 3}}}, "none is among the methods"),
        ({"methods": ["full"]}, "the full model skips nothing"),
        ({"judge": {"model": "m"}}, "a judge rates summarization and mtbench"),
    ],
)
def test_settings_that_would_measure_nothing_are_refused(
    text_file: Path, questions: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(text_file, questions, **changes)


def test_a_profile_of_another_model_is_refused(
    loaded: LoadedModel, config: SweepConfig, tmp_path: Path
) -> None:
    with pytest.raises(ProfileMismatch, match="number of layers"):
        run_sweep(loaded, SkipProfile.load("smollm2-135m-instruct"), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_are_written_whole_and_a_folder_belongs_to_its_settings(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(text_file, questions, ratios=[0.125, 0.25])
    recorded = sweep_settings(config, profile)
    begin_folder(tmp_path, recorded, overwrite=False)
    assert (tmp_path / "sweep.json").exists()  # before anything ran
    result = run_sweep(loaded, profile, config, tmp_path)
    written = write_results(result, loaded, recorded, command="skipcal sweep")
    assert {p.name for p in written} == {
        "results.csv", "results.parquet", "tables.md", "sweep.json", "quality.png",
    }  # fmt: skip
    assert all(p.stat().st_size > 0 for p in written)
    stored = pd.read_parquet(tmp_path / "results.parquet")
    assert stored["value"].tolist() == result.frame["value"].tolist()
    document = json.loads((tmp_path / "sweep.json").read_text())
    assert document["config"]["tasks"]["freebaseqa"]["data_file"] == "questions.jsonl"
    assert set(document["data_sha256"]) == {"questions.jsonl", "text.txt"}
    assert str(tmp_path.parent) not in (tmp_path / "sweep.json").read_text()
    begin_folder(tmp_path, recorded, overwrite=False)  # the same settings go on
    other = settings(text_file, questions, ratios=[0.25])
    (tmp_path / "figure_5_mtbench.png").touch()
    for changed in (
        sweep_settings(other, profile),
        sweep_settings(config, profile.model_copy(update={"config": {}})),  # another profile of that name
    ):
        with pytest.raises(ConfigError, match="holds results of other settings"):
            begin_folder(tmp_path, changed, overwrite=False)
    begin_folder(tmp_path, sweep_settings(other, profile), overwrite=True)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {
        "records",
        "sweep.json",
        questions.name,
    }  # nothing that could be taken for the new results


def test_data_of_the_same_name_is_told_apart(
    profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    before = sweep_settings(settings(text_file, questions), profile)
    questions.write_text(questions.read_text().replace("w1", "w2"))
    with pytest.raises(ConfigError, match="other settings"):
        begin_folder(tmp_path, before, overwrite=False)
        begin_folder(tmp_path, sweep_settings(settings(text_file, questions), profile), overwrite=False)


@pytest.mark.parametrize("part", ["generation_config", "config", "tokenizer"])
def test_records_are_of_one_model_with_all_its_settings(
    loaded: LoadedModel, profile: SkipProfile, config: SweepConfig, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, part: str,
) -> None:  # fmt: skip
    run_sweep(loaded, profile, config, tmp_path)
    before = set((tmp_path / "records").rglob("*.jsonl"))
    if part == "generation_config":
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", 5)
    elif part == "config":
        monkeypatch.setattr(loaded.model.config, "rms_norm_eps", 1e-3)
    else:
        changed = copy.deepcopy(loaded.tokenizer)
        changed.add_tokens(["w97"])
        loaded = replace(loaded, tokenizer=changed)
    run_sweep(loaded, profile, config, tmp_path)
    added = set((tmp_path / "records").rglob("*.jsonl")) - before
    assert len(added) == len(before)


def test_a_subset_carries_its_own_ratio(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(f"w{(n * 5) % 7}" for n in range(900)))
    task = {"windows": 3, "window_tokens": 32, "warm_up_tokens": 3}

    def ratios(*files: str) -> dict[str, float]:
        config = settings(
            text_file, questions, methods=["ffn-skip"], ratios=[0.3], batch_size=4,
            tasks={"perplexity": {**task, "data_files": list(files)}},
        )  # fmt: skip
        frame = run_sweep(loaded, profile, config, tmp_path / "-".join(f[0] for f in files)).frame
        rows = frame[(frame["metric"] == "kl") & (frame["method"] == "ffn-skip")]
        return dict(zip(rows["subset"], rows["realised_skip_ratio"], strict=True))

    together = ratios(f"a={text_file}", f"b={other}")
    assert together["a"] == ratios(f"a={text_file}")["all"]
    assert together["b"] == ratios(f"b={other}")["all"]
    assert together["a"] != together["b"]
    assert together["all"] == pytest.approx((together["a"] + together["b"]) / 2)


def test_without_a_ratio_the_profiles_own_policy_is_evaluated(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    own = replace(profile.cosine_policy, threshold=0.7, warm_up_tokens=1)
    edited = profile.model_copy(update={"policy": own})
    config = settings(
        text_file, questions, methods=["ffn-skip"], ratios=None,
        tasks={"perplexity": {"data_files": [str(text_file)], "windows": 2, "window_tokens": 40}},
    )  # fmt: skip
    frame = run_sweep(loaded, edited, config, tmp_path).frame
    assert set(frame["threshold"].dropna()) == {0.7}
    assert set(frame["warm_up_tokens"]) == {1}  # the profile's, where the task names none
    full = profile.model_copy(update={"policy": replace(own, threshold=2.0)})
    with pytest.raises(ConfigError, match="the profile recommends the full model"):
        plan(full, config)


def test_answers_within_the_warm_up_cannot_be_matched(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", list(range(97)))
    config = settings(
        text_file, questions, methods=["ffn-skip"],
        tasks={"freebaseqa": {"data_file": str(questions), "new_tokens": 10, "match_items": 3}},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="every answer ended within the warm-up"):
        run_sweep(loaded, profile, config, tmp_path)
    plain = settings(
        text_file, questions, tasks={"freebaseqa": {"data_file": str(questions), "new_tokens": 10}}
    )
    text = tables(run_sweep(loaded, profile, plain, tmp_path / "plain").frame)
    assert "nan" not in text and "| - |" in text


def test_each_warm_up_has_tables_of_its_own(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(text_file, questions, methods=["ffn-skip"], warm_ups=[0, 4])
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    text = tables(frame)
    for warm_up in (0, 4):
        block = text.split(f"## Methods at 0.25, warm-up of {warm_up} tokens")[1].split("##")[0]
        row = frame[
            (frame["method"] == "ffn-skip") & (frame["metric"] == "kl") & (frame["subset"] == ALL)
            & (frame["warm_up_tokens"] == warm_up)
        ].iloc[0]  # fmt: skip
        assert f"{row['value']:.3g} [" in block


def test_tables_in_the_papers_forms(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    frame = run_sweep(loaded, profile, settings(text_file, questions, ratios=[0.125, 0.25]), tmp_path).frame
    text = tables(frame)
    kl = frame[(frame["metric"] == "kl") & (frame["subset"] == ALL)]
    row = kl[(kl["method"] == "random") & (kl["target_skip_ratio"] == 0.25)].iloc[0]
    cell = f"{row['value']:.3g} [{row['ci_low']:.3g}, {row['ci_high']:.3g}]"
    block = text.split("perplexity: kl by skip ratio")[1].split("##")[0].splitlines()
    line = next(line for line in block if line.startswith("| 0.25 |"))
    header = next(line for line in block if line.startswith("| skip ratio |"))
    assert [part.strip() for part in line.split("|")][header.split("|").index(" random ")] == cell
    assert "## Methods at 0.125" in text


def test_figures_follow_what_was_measured(
    loaded: LoadedModel, profile: SkipProfile, text_file: Path, questions: Path, tmp_path: Path
) -> None:
    config = settings(text_file, questions, methods=["ffn-skip"], warm_ups=[0, 4])
    frame = run_sweep(loaded, profile, config, tmp_path).frame
    assert [p.name for p in save_sweep_figures(frame, tmp_path, overwrite=True)] == ["warm_up.png"]
