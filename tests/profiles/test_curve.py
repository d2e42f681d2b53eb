"""The figure says what the profile says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from skipcal.errors import ConfigError, OutputExists
from skipcal.profiles.curve import plot_saturation, save_figure
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles
from skipcal.style import COLD, SKIPPABLE


@pytest.fixture
def profile() -> SkipProfile:
    return SkipProfile.load(shipped_profiles()[0])


def test_curves_bands_regions_and_threshold_are_the_profiles(profile: SkipProfile) -> None:
    _, ax = plt.subplots()
    assert plot_saturation(profile, ax=ax) is ax
    lines: dict[str, Any] = {str(line.get_label()): line for line in ax.lines}
    corpora = [name for name in profile.layers if name != "pooled"]
    assert len(corpora) > 1
    for corpus in corpora:
        np.testing.assert_allclose(lines[corpus].get_ydata(), profile.layers[corpus].mean)
    band = next(c for c in ax.collections if c.get_paths())
    heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
    first = profile.layers[corpora[0]]
    assert set(heights.round(9)) == {round(q, 9) for q in (*first.q25, *first.q75)}
    patches: list[Any] = list(ax.patches)
    spans = [
        (to_hex(patch.get_facecolor()), patch.get_x() + 0.5, patch.get_x() + patch.get_width() + 0.5)
        for patch in patches
    ]
    policy = profile.cosine_policy
    assert spans == [
        (COLD, 0, policy.cold_s),
        (COLD, policy.cold_e, profile.model.num_layers),
        (SKIPPABLE, policy.cold_s, policy.cold_e),
    ]
    threshold = next(line for label, line in lines.items() if label.startswith("threshold"))
    assert set(threshold.get_ydata()) == {policy.threshold}
    assert "0-based" in ax.get_xlabel()
    assert ax.get_ylabel() == "cos(h, h + f)"
    plt.close("all")


def test_a_frame_can_be_drawn_too(profile: SkipProfile) -> None:
    _, ax = plt.subplots()
    plot_saturation(profile.to_frame(), ax=ax, zoom=True)
    assert len(ax.lines) == len(profile.layers) - 1
    assert not ax.patches
    plt.close("all")


def test_the_zoom_shows_the_region_and_the_threshold(profile: SkipProfile) -> None:
    _, ax = plt.subplots()
    plot_saturation(profile, ax=ax, zoom=True)
    low, high = ax.get_ylim()
    assert low > 0.8
    assert low < profile.cosine_policy.threshold < high <= 1
    plt.close("all")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_files_are_written_whole_and_alike(tmp_path: Path, profile: SkipProfile, suffix: str) -> None:
    first, second = tmp_path / f"a.{suffix}", tmp_path / f"b.{suffix}"
    for path in (first, second):
        save_figure(profile, path, overwrite=False)
    assert first.read_bytes() == second.read_bytes()
    assert len(first.read_bytes()) > 5000
    assert sorted(p.name for p in tmp_path.iterdir()) == [first.name, second.name]
    with pytest.raises(OutputExists):
        save_figure(profile, first, overwrite=False)


def test_another_ending_is_refused(tmp_path: Path, profile: SkipProfile) -> None:
    with pytest.raises(ConfigError, match=r"'\.gif' is not one of \.png, \.svg, \.pdf"):
        save_figure(profile, tmp_path / "a.gif", overwrite=False)


def test_drawing_changes_no_setting_of_matplotlib(tmp_path: Path, profile: SkipProfile) -> None:
    before = json.dumps(dict(matplotlib.rcParams), default=str)
    save_figure(profile, tmp_path / "a.png", overwrite=False)
    assert json.dumps(dict(matplotlib.rcParams), default=str) == before
    assert not plt.get_fignums()
