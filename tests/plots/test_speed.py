"""The figure of a speed measurement shows the numbers of the frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from skipcal.errors import ConfigError
from skipcal.plots.speed import plot_speed_up, save_speed_figure


def frame() -> pd.DataFrame:
    rows = [
        ("full", 0.0, 1.0, 1.0),
        ("skipping", 0.5, 1.3, 1.4),
        ("watching", 0.0, 0.97, 1.0),
        ("skipping", 0.25, 1.1, 1.2),
    ]
    made = pd.DataFrame(rows, columns=["arm", "skip_ratio", "speed_up_over_full", "ideal_speed_up"])
    made["speed_up_over_full_min"] = made["speed_up_over_full"] - 0.1
    made["speed_up_over_full_max"] = made["speed_up_over_full"] + 0.1
    return made.assign(batch_size=1, context_tokens=128, comparable=True)


@pytest.fixture
def ax() -> Any:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_the_speed_up_stands_beside_its_ideal(ax: Any) -> None:
    assert plot_speed_up(frame(), ax=ax) is ax
    lines: dict[Any, Any] = {line.get_label(): line for line in ax.lines}
    measured = lines["batch 1, context 128"]
    assert list(measured.get_xdata()) == [0.0, 0.25, 0.5]
    assert list(measured.get_ydata()) == [0.97, 1.1, 1.3]
    assert list(lines["ideal by bytes, batch 1, context 128"].get_ydata()) == [1.0, 1.2, 1.4]
    assert "speed-up" in ax.get_ylabel()


def test_a_frame_without_skipping_is_refused(ax: Any) -> None:
    with pytest.raises(ConfigError, match="no skipping arm"):
        plot_speed_up(frame()[:1], ax=ax)


def test_a_figure_needs_a_known_ending(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ending '\.txt' is not one of"):
        save_speed_figure({}, tmp_path / "a.txt", overwrite=False)
