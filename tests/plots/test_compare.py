"""The figures of a comparison say what the profiles and the frame say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from skipcal.errors import ConfigError, OutputExists
from skipcal.plots.compare import plot_curves, plot_transfer, save_curves, save_transfer
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles


@pytest.fixture
def profiles() -> dict[str, SkipProfile]:
    profile = SkipProfile.load(shipped_profiles()[0])
    only = {name: stats for name, stats in profile.layers.items() if name != "pooled"}
    first, second = [
        profile.model_copy(update={"layers": {**profile.layers, "pooled": stats}}) for stats in only.values()
    ]
    regions = second.regions.model_copy(update={"cold_s_interval": None, "cold_e_interval": None})
    return {"one": first, "two": second.model_copy(update={"regions": regions})}


@pytest.fixture
def frame() -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "profile": profile,
                "text": text,
                "target_skip_ratio": 0.25,
                "realised_skip_ratio": 0.2 + 0.05 * i + 0.01 * j,
                "perplexity": 30.0 * (i + 1) * (j + 2),
                "full_perplexity": 20.0 + j,
            }
            for i, profile in enumerate(("one", "two"))
            for j, text in enumerate(("first", "second", "third"))
        ]
    )


@pytest.fixture(autouse=True)
def _closed() -> Any:
    yield
    plt.close("all")


def test_there_is_one_curve_and_one_bar_per_profile(profiles: dict[str, SkipProfile]) -> None:
    _, ax = plt.subplots()
    assert plot_curves(profiles, ax=ax) is ax
    lines: dict[str, Any] = {str(line.get_label()): line for line in ax.lines}
    for name, profile in profiles.items():
        np.testing.assert_allclose(lines[name].get_ydata(), profile.layers["pooled"].mean)
    patches: list[Any] = list(ax.patches)
    bars = [(p.get_x() + 0.5, p.get_x() + 0.5 + p.get_width()) for p in patches]
    assert bars == [(p.cosine_policy.cold_s, p.cosine_policy.cold_e) for p in profiles.values()]
    whiskers = [np.asarray(line.get_xdata()) + 0.5 for line in ax.lines if len(line.get_xdata()) == 2]  # type: ignore[arg-type]
    regions = profiles["one"].regions
    assert [tuple(ends) for ends in whiskers] == [regions.cold_s_interval, regions.cold_e_interval]
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert "0-based" in ax.get_xlabel()


def test_no_curve_is_hidden_behind_the_bars(profiles: dict[str, SkipProfile]) -> None:
    figure, ax = plt.subplots()
    plot_curves(profiles, ax=ax)
    figure.canvas.draw()
    top = max(patch.get_window_extent().y1 for patch in ax.patches)
    lowest = min(min(profile.layers["pooled"].mean) for profile in profiles.values())
    assert ax.transData.transform((0, lowest))[1] > top


def test_the_zoom_shows_the_regions_alone(profiles: dict[str, SkipProfile]) -> None:
    _, ax = plt.subplots()
    plot_curves(profiles, ax=ax, zoom=True, legend=False)
    inside = [
        m
        for p in profiles.values()
        for m in p.layers["pooled"].mean[p.cosine_policy.cold_s : p.cosine_policy.cold_e]
    ]
    low, high = ax.get_ylim()
    assert low < min(inside) < max(inside) < high <= 1
    assert not ax.patches
    assert ax.get_legend() is None


@pytest.mark.parametrize("value", ["realised_skip_ratio", "perplexity"])
def test_every_cell_of_the_matrix_is_written_out(frame: pd.DataFrame, value: str) -> None:
    _, ax = plt.subplots()
    assert plot_transfer(frame, value=value, ax=ax) is ax
    shown = [text.get_text() for text in ax.texts]
    expected = [f"{x:.3f}" if value == "realised_skip_ratio" else f"{x:.4g}" for x in frame[value]]
    full = [f"{x:.4g}" for x in (20, 21, 22)] if value == "perplexity" else []
    assert shown == expected + full
    rows = ["one", "two"] + (["full model"] if full else [])
    assert [text.get_text() for text in ax.get_yticklabels()] == rows
    assert [text.get_text() for text in ax.get_xticklabels()] == ["first", "second", "third"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("text", "profile")


def test_formats_of_texts_stand_in_a_line_of_their_own(frame: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    plot_transfer(frame.replace({"text": {"second": "gsm8k:chain-of-thought"}}), ax=ax)
    labels = ax.get_xticklabels()
    assert [text.get_text() for text in labels] == ["first", "gsm8k:\nchain-of-thought", "third"]
    assert {text.get_rotation() for text in labels} == {0}
    _, ax = plt.subplots()
    plot_transfer(frame.replace({"text": {"second": "a-name-without-a-place-to-break"}}), ax=ax)
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {30}


def test_ratios_are_coloured_by_their_distance_from_the_target(frame: pd.DataFrame) -> None:
    _, ax = plt.subplots()
    plot_transfer(frame, ax=ax)
    mesh: Any = ax.collections[0]
    assert mesh.norm.vcenter == 0.25
    low, high = mesh.get_clim()
    assert high - 0.25 == pytest.approx(0.25 - low)
    assert low <= frame["realised_skip_ratio"].min()
    assert frame["realised_skip_ratio"].max() <= high


def test_matrices_of_one_value_and_without_a_target_are_drawn(frame: pd.DataFrame) -> None:
    same = frame.assign(target_skip_ratio=None, realised_skip_ratio=0.0, perplexity=9.0, full_perplexity=9.0)
    for value in ("realised_skip_ratio", "perplexity"):
        figure, ax = plt.subplots()
        plot_transfer(same, value=value, ax=ax)
        figure.canvas.draw()
        shown = [text.get_text() for text in ax.texts]
        assert len(shown) == (
            len(same) if value == "realised_skip_ratio" else len(same) + 3
        )  # the full model
        assert {float(text) for text in shown} == {float(same[value].iloc[0])}


def test_other_values_and_no_profiles_are_refused(frame: pd.DataFrame) -> None:
    with pytest.raises(ConfigError, match="'tokens' is not one of realised_skip_ratio, perplexity"):
        plot_transfer(frame, value="tokens")
    with pytest.raises(ConfigError, match="no profile to draw"):
        plot_curves({})


def test_files_are_written_whole_and_alike(
    tmp_path: Path, profiles: dict[str, SkipProfile], frame: pd.DataFrame
) -> None:
    for name in ("a", "b"):
        save_curves(profiles, tmp_path / f"curves_{name}.png", overwrite=False)
        save_transfer(frame, tmp_path / f"ratio_{name}.png", value="realised_skip_ratio", overwrite=False)
    assert not plt.get_fignums()
    for kind in ("curves", "ratio"):
        first = (tmp_path / f"{kind}_a.png").read_bytes()
        assert first == (tmp_path / f"{kind}_b.png").read_bytes()
        assert len(first) > 5000
    with pytest.raises(OutputExists):
        save_curves(profiles, tmp_path / "curves_a.png", overwrite=False)
