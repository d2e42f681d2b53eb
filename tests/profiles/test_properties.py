"""What holds for every valid profile: it comes back as it was, and its numbers are where they belong."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from documents import corpus, document, gate_document, tuned_document
from hypothesis import given, settings
from hypothesis import strategies as st

from skipcal.core.gate import NEVER
from skipcal.errors import TargetOutOfReach
from skipcal.files.markdown import escaped
from skipcal.profiles.policies import threshold_for
from skipcal.profiles.schema import SkipProfile

STATISTICS = ("mean", "std", "min", "q05", "q25", "q50", "q75", "q95", "norm_ratio_mean", "block_influence")
cosines = st.floats(-1, 1)
ratios = st.floats(0, 1)
lengths = st.floats(0, 1e6)
words = st.text(st.characters(codec="utf-8"), max_size=12)


@st.composite
def statistics(draw: st.DrawFn, layers: int) -> dict[str, Any]:
    def each(values: st.SearchStrategy[Any]) -> list[Any]:
        return draw(st.lists(values, min_size=layers, max_size=layers))

    counts = st.integers(0, 2**40)
    return {
        **{name: each(cosines) for name in ("mean", "min", "q05", "q25", "q50", "q75", "q95")},
        **{name: each(lengths) for name in ("std", "norm_ratio_mean")},
        "count": each(counts),
        "histogram": [[n, *[0] * 199] for n in each(counts)],
        "block_influence": draw(st.none() | st.lists(st.floats(0, 2), min_size=layers, max_size=layers)),
    }


@st.composite
def points(draw: st.DrawFn, thresholds: st.SearchStrategy[float], *, rising: bool) -> list[dict[str, Any]]:
    targets = sorted(draw(st.sets(st.integers(1, 100), max_size=6)))
    values = sorted(draw(st.lists(thresholds, min_size=len(targets), max_size=len(targets))))
    return [
        {
            "target_skip_ratio": target / 100,
            "threshold": threshold,
            "predicted_skip_ratio": draw(ratios),
            "realised_skip_ratio": draw(ratios),
        }
        for target, threshold in zip(targets, values if rising else values[::-1], strict=True)
    ]


@st.composite
def profiles(draw: st.DrawFn) -> dict[str, Any]:
    """Documents of every rule, with one corpus or several."""
    layers = draw(st.integers(2, 5))
    cold_s = draw(st.integers(0, layers))
    made: dict[str, Any] = draw(st.sampled_from([document, gate_document, tuned_document]))(layers=layers)
    names = draw(st.sets(words.filter(lambda name: name != "pooled"), max_size=2))
    made["layers"] = {name: draw(statistics(layers)) for name in ("pooled", *sorted(names))}
    made["calibration"]["corpora"] = [corpus(name) for name in sorted(names)]
    made["calibration"]["mode"] = draw(st.sampled_from(["generate", "prefill"]))
    made["model"]["name"] = draw(words)
    made["regions"].update(
        cold_s=cold_s, cold_e=draw(st.integers(cold_s, layers)), cold_s_interval=None, cold_e_interval=None,
        warnings=draw(st.lists(words, max_size=2)),
    )  # fmt: skip
    region = {"cold_s": cold_s, "cold_e": made["regions"]["cold_e"], "threshold": draw(cosines)}
    made["paper_policy" if "paper_policy" in made else "policy"].update(region)
    made["operating_points"] = [
        {**point, "verified_skip_ratio": draw(st.none() | ratios)}
        for point in draw(points(st.floats(-1, 2), rising=False))
    ]
    if "gate" in made:
        made["gate"]["layers"] = [layers - 1]
        made["gate"]["operating_points"] = [
            {**point, "by_corpus": {"text": point["realised_skip_ratio"]}}
            for point in draw(points(st.floats(-50, 50), rising=True))
        ]
    if "policy" in made and made["policy"]["rule"] == "static":
        made["policy"]["layers"] = sorted(draw(st.sets(st.integers(0, layers - 1))))
    return made


def read(made: dict[str, Any]) -> SkipProfile:
    return SkipProfile._parse(json.dumps(made).encode(), "made.json", Path())


@settings(max_examples=50)
@given(made=profiles())
def test_a_profile_comes_back_as_it_was(
    made: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    profile = read(made)
    text = profile.to_json()
    assert json.loads(text) == made
    if profile.gate is None:  # else its tensors would be asked for
        profile.save(folder / "made.json", overwrite=True)
        assert (folder / "made.json").read_text(encoding="utf-8") == text
        again = SkipProfile.load(folder / "made.json")
    else:
        again = read(json.loads(text))
    assert again == profile
    assert again.to_json() == text


@settings(max_examples=40)
@given(made=profiles())
def test_the_frame_holds_every_statistic_once(made: dict[str, Any]) -> None:
    frame = read(made).to_frame()
    expected = {
        (name, layer, stat): (value, found["count"][layer])
        for name, found in made["layers"].items()
        for stat in STATISTICS
        if found[stat] is not None
        for layer, value in enumerate(found[stat])
    }
    rows = {(row.corpus, row.layer, row.stat): (row.value, row.n) for row in frame.itertuples()}
    assert len(rows) == len(frame)
    assert rows == expected
    assert set(frame["part"]) == {"generated" if made["calibration"]["mode"] == "generate" else "prefill"}


@settings(max_examples=60)
@given(made=profiles(), asked=st.lists(ratios, max_size=8))
def test_thresholds_follow_the_target(made: dict[str, Any], asked: list[float]) -> None:
    """Falling with it for the rule `cosine`, rising for a gate, between the points on straight lines."""
    profile = read(made)
    reached: list[float] = []
    known = [(p.target_skip_ratio, p.threshold) for p in profile.operating_points]
    for target in sorted({*asked, *(target for target, _ in known)} - {0.0}):
        try:
            policy = profile.cosine_policy_for(target)
        except TargetOutOfReach:
            assert not known or not known[0][0] <= target <= known[-1][0]
            continue
        assert (policy.cold_s, policy.cold_e) == (profile.cosine_policy.cold_s, profile.cosine_policy.cold_e)
        line = np.interp(target, [ratio for ratio, _ in known], [threshold for _, threshold in known])
        assert policy.threshold == pytest.approx(line, abs=1e-7)
        reached.append(policy.threshold)
    assert all(second <= first + 1e-12 for first, second in pairwise(reached))
    assert len(reached) >= len(known)
    if profile.gate is not None and profile.gate.operating_points:
        gates = profile.gate.operating_points
        low, high = gates[0].target_skip_ratio, gates[-1].target_skip_ratio
        rising = [threshold_for(gates, target, never=NEVER) for target in np.linspace(low, high, 7)]
        assert all(first <= second + 1e-9 for first, second in pairwise(rising))
        assert (rising[0], rising[-1]) == (gates[0].threshold, gates[-1].threshold)
    assert profile.cosine_policy_for(0.0).method == "full"


@settings(max_examples=40)
@given(made=profiles())
def test_the_card_holds_every_operating_point_and_warning(made: dict[str, Any]) -> None:
    profile = read(made)
    card = profile.model_card("me/tiny")
    assert all(c.isprintable() or c == "\n" for c in card)
    for point in made["operating_points"]:
        numbers = (point["predicted_skip_ratio"], point["realised_skip_ratio"], point["verified_skip_ratio"])
        cells = ["-" if value is None else f"{value:.3f}" for value in numbers]
        assert f"| {point['threshold']:.6f} | {' | '.join(cells)} |" in card
    for point in made.get("gate", {}).get("operating_points", []):
        assert f"| {point['threshold']:.3f} | {point['predicted_skip_ratio']:.3f} |" in card
    assert card.count("> **Warning:** ") >= len(made["regions"]["warnings"])
    for text in made["regions"]["warnings"]:
        assert f"> **Warning:** {escaped(text)}" in card
    assert card.count("\n```") % 2 == 0
