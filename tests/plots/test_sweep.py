"""Figures of sweeps show the numbers of the frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from skipcal.errors import ConfigError
from skipcal.plots.sweep import (
    METHOD_ORDER,
    main_metrics,
    plot_by_subset,
    plot_quality,
    plot_warm_up,
    save_sweep_figures,
    sweep_figures,
)
from skipcal.profiles.methods import METHODS
from skipcal.style import MARKERS


def frame(task: str = "perplexity", metric: str = "perplexity", **changes: Any) -> pd.DataFrame:
    rows = [{"method": "full", "target_skip_ratio": None, "realised_skip_ratio": 0.0, "value": 20.0}]
    for place, method in enumerate(("ffn-skip", "random")):
        rows += [
            {
                "method": method,
                "target_skip_ratio": r,
                "realised_skip_ratio": r + 0.01,
                "value": 30.0 + 9 * place + r,
            }
            for r in (0.25, 0.05)
        ]
    made = pd.DataFrame(rows).assign(task=task, metric=metric, subset="all", warm_up_tokens=25)
    made["ci_low"], made["ci_high"] = made["value"] - 2.0, made["value"] + 3.0
    return made.assign(**changes)


@pytest.fixture
def ax() -> Any:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_each_method_is_a_line_over_the_realised_ratio(ax: Any) -> None:
    plot_quality(frame(), task="perplexity", metric="perplexity", ax=ax)
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert set(lines) == {"ffn-skip", "random"}
    assert list(lines["random"].get_xdata()) == pytest.approx([0.06, 0.26])
    assert list(lines["random"].get_ydata()) == [39.05, 39.25]
    full = next(line for line in ax.lines if line.get_label() == "full model")
    assert list(full.get_ydata()) == [20.0, 20.0]
    assert ax.get_yscale() == "log" and ax.get_xlabel() == "realised skip ratio"


def test_intervals_are_drawn_from_low_to_high(ax: Any) -> None:
    plot_quality(frame(), task="perplexity", metric="perplexity", ax=ax)
    bars = ax.containers[1].lines[2][0].get_segments()
    assert [(seg[0][1], seg[1][1]) for seg in bars] == [(37.05, 42.05), (37.25, 42.25)]


def test_a_metric_that_is_not_there_is_refused(ax: Any) -> None:
    with pytest.raises(ConfigError, match="no metric 'kl' of task 'perplexity' for 'all'"):
        plot_quality(frame(), task="perplexity", metric="kl", ax=ax)


def bench() -> pd.DataFrame:
    whole = frame("mtbench", "judge_rating")
    return pd.concat([whole, whole.assign(subset="math"), whole.assign(subset="writing", value=5.0)])


def test_bars_by_category(ax: Any) -> None:
    rows = bench()
    at = rows[rows["target_skip_ratio"].isin([0.25]) | (rows["method"] == "full")]
    plot_by_subset(at, task="mtbench", metric="judge_rating", subsets=["math", "writing"], ax=ax)
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in ax.containers}
    assert heights == {"full": [20.0, 5.0], "ffn-skip": [30.25, 5.0], "random": [39.25, 5.0]}
    with pytest.raises(ConfigError, match="one target skip ratio"):
        plot_by_subset(rows, task="mtbench", metric="judge_rating", subsets=["math"], ax=ax)


def test_the_ablation_is_a_line_over_the_warm_up(ax: Any) -> None:
    rows = pd.concat([frame(), frame(warm_up_tokens=5, value=50.0)])
    plot_warm_up(rows, task="perplexity", metric="perplexity", ax=ax)
    line = next(line for line in ax.lines if line.get_label() == "random at 0.25")
    assert list(line.get_xdata()) == [5, 25]
    assert list(line.get_ydata()) == [50.0, 39.25]


def test_the_papers_figures_are_drawn_where_their_tasks_were_run(tmp_path: Path) -> None:
    summaries = pd.concat(
        [frame("summarization", m, subset=s) for m in ("rougeL", "copy_rate")
         for s in ("all", "small", "medium", "large")]
    )  # fmt: skip
    everything = pd.concat([frame(), summaries, bench()])
    assert set(sweep_figures(everything)) == {"quality", "figure_3_summarization", "figure_5_mtbench"}
    written = save_sweep_figures(everything, tmp_path, overwrite=False)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert plt.get_fignums() == []
    assert main_metrics(everything) == [
        ("perplexity", "perplexity"), ("summarization", "rougeL"), ("mtbench", "judge_rating"),
    ]  # fmt: skip
    three = sweep_figures(everything)["figure_3_summarization"]()
    assert isinstance(three, Figure)
    assert [a.get_title() for a in three.axes[:3]] == [
        "summarization, small", "summarization, medium", "summarization, large",
    ]  # fmt: skip
    plt.close(three)


@pytest.mark.parametrize("metric", ["kl", "excess_nll"])
def test_losses_over_the_full_models_share_an_axis_with_its_zero(ax: Any, metric: str) -> None:
    plot_quality(frame("perplexity", metric), task="perplexity", metric=metric, ax=ax)
    places = ax.yaxis.get_transform().transform([[0.0], [0.1], [1.0], [10.0]]).ravel()
    assert places[0] == 0 and places[2] - places[1] == pytest.approx(places[3] - places[2], rel=0.1)


def test_every_method_has_a_line_of_its_own() -> None:
    """A method that is missing here would be left out of every figure without a word."""
    assert set(METHOD_ORDER) == set(METHODS) - {"full"}
    assert len(set(MARKERS)) == len(METHOD_ORDER)


def test_no_two_methods_have_the_same_colour(ax: Any) -> None:
    rows = pd.concat([frame("perplexity", "kl").iloc[:1].assign(method=m) for m in METHOD_ORDER])
    plot_quality(rows, task="perplexity", metric="kl", ax=ax)
    lines = [bars.lines[0] for bars in ax.containers]
    assert [bars.get_label() for bars in ax.containers] == list(METHOD_ORDER)
    assert len({to_hex(line.get_color()) for line in lines}) == len(METHOD_ORDER)
