"""Figures of a sweep: quality by skip ratio, by length of text, by category, by warm-up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns

from skipcal.errors import ConfigError
from skipcal.style import MARKERS, PALETTE, THRESHOLD, as_text, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The order of colours: what is new goes to the end, so that older figures keep theirs.
METHOD_ORDER = (
    "ffn-skip",
    "random",
    "no-input-adaptive",
    "static",
    "shortgpt",
    "skipdecode",
    "gate",
    "static+surrogates",
    "random+surrogates",
    "no-input-adaptive+surrogates",
    "ffn-skip+surrogates",
    "static+fitted",
    "ffn-skip+damage",
)
LABELS = {
    "perplexity": "perplexity",
    "perplexity_after_warm_up": "perplexity after the warm-up",
    "kl": "KL to the full model (nats/token)",
    "excess_nll": "loss over the full model's (nats/token)",
    "exact_match": "exact match",
    "contains_answer": "answers that contain an alias",
    "rougeL": "ROUGE-L F1",
    "copy_rate": "copied share of the summary",
    "collapse_rate": "collapsed answers",
    "judge_rating": "judge's rating (0-10)",
    "token_agreement": "equal tokens",
    "common_prefix_tokens": "common prefix (tokens)",
}
FIGURES = tuple(
    f"{stem}.png" for stem in ("quality", "warm_up", "figure_3_summarization", "figure_5_mtbench")
)
_MORE = ("#332288", "#661100", "#999933")  # the palette has ten colours, and would begin again
_LOGARITHMIC = ("perplexity", "perplexity_after_warm_up")
# Methods differ by powers of ten here too, but the full model's own value is 0.
_LINEAR_BELOW = {"kl": 0.01, "excess_nll": 0.01}


def plot_quality(
    frame: pd.DataFrame, *, task: str, metric: str, subset: str = "all", ax: Axes | None = None
) -> Axes:
    """Draw a metric over the realised skip ratio, a line a method, with 95 % bootstrap intervals.

    frame: what a sweep gives. The dashed line is the full model, the band its interval.
    Raises ConfigError when the frame has no such metric.
    """
    import matplotlib.pyplot as plt

    rows = _rows(frame, task, metric, subset)
    ax = ax or plt.gca()
    for method, colour, marker in _styles(rows):
        line = rows[rows["method"] == method].sort_values("realised_skip_ratio")
        errors = np.abs(line[["ci_low", "ci_high"]].to_numpy(float).T - line["value"].to_numpy(float))
        ax.errorbar(
            line["realised_skip_ratio"], line["value"], yerr=np.nan_to_num(errors), color=colour,
            marker=marker, ms=5, lw=1.3, elinewidth=0.8, capsize=2, label=method,
        )  # fmt: skip
    full = rows[rows["method"] == "full"]
    if len(full):
        row = full.iloc[0]
        ax.axhline(row["value"], color=THRESHOLD, ls="--", lw=1, label="full model")
        if pd.notna(row["ci_low"]):
            ax.axhspan(row["ci_low"], row["ci_high"], color=THRESHOLD, alpha=0.08, lw=0)
    _scale(ax, metric)
    ax.set(xlabel="realised skip ratio", ylabel=LABELS.get(metric, metric.replace("_", " ")))
    return ax


def plot_by_subset(
    frame: pd.DataFrame, *, task: str, metric: str, subsets: Sequence[str], ax: Axes | None = None
) -> Axes:
    """Draw a metric as bars, a group a subset and a bar a method, at the frame's one target ratio."""
    import matplotlib.pyplot as plt

    ax = ax or plt.gca()
    rows = pd.concat([_rows(frame, task, metric, subset) for subset in subsets])
    if rows["target_skip_ratio"].nunique() > 1:
        raise ConfigError("bars show one target skip ratio; select it in the frame first")
    methods = ["full", *(method for method, _, _ in _styles(rows))]
    colours = [THRESHOLD, *(colour for _, colour, _ in _styles(rows))]
    width = 0.8 / len(methods)
    for place, (method, colour) in enumerate(zip(methods, colours, strict=True)):
        values = rows[rows["method"] == method].set_index("subset")["value"].reindex(list(subsets))
        at = np.arange(len(subsets)) + (place - (len(methods) - 1) / 2) * width
        ax.bar(at, values, width=width * 0.92, color=colour, label=method)
    ax.set_xticks(np.arange(len(subsets)), list(map(as_text, subsets)))
    ax.grid(axis="x", visible=False)
    ax.set(ylabel=LABELS.get(metric, metric.replace("_", " ")))
    return ax


def plot_warm_up(frame: pd.DataFrame, *, task: str, metric: str, ax: Axes | None = None) -> Axes:
    """Draw a metric over the length of the warm-up, a line a method (the paper's ablation)."""
    import matplotlib.pyplot as plt

    rows = _rows(frame, task, metric, "all")
    ax = ax or plt.gca()
    for method, colour, marker in _styles(rows):
        for target, line in rows[rows["method"] == method].groupby("target_skip_ratio"):
            line = line.sort_values("warm_up_tokens")
            ax.plot(
                line["warm_up_tokens"], line["value"], color=colour, marker=marker, ms=5,
                label=f"{method} at {target:g}",
            )  # fmt: skip
    full = rows[rows["method"] == "full"].sort_values("warm_up_tokens")
    ax.plot(full["warm_up_tokens"], full["value"], color=THRESHOLD, ls="--", lw=1, label="full model")
    _scale(ax, metric)
    ax.set(xlabel="warm-up (tokens)", ylabel=LABELS.get(metric, metric.replace("_", " ")))
    return ax


def sweep_figures(frame: pd.DataFrame) -> dict[str, Callable[[], Figure]]:
    """The figures that a frame has the rows for, by file stem."""
    figures: dict[str, Callable[[], Figure]] = {}
    if frame["warm_up_tokens"].nunique() > 1 and frame.groupby("task")["warm_up_tokens"].nunique().max() > 1:
        figures["warm_up"] = lambda: _panels(
            [(t, m, "all") for t, m in main_metrics(frame)],
            lambda t, m, s, ax: plot_warm_up(frame, task=t, metric=m, ax=ax),
        )
        return figures
    panels = [(task, metric, "all") for task, metric in main_metrics(frame)]
    figures["quality"] = lambda: _panels(panels, _quality(frame))
    buckets = [b for b in ("small", "medium", "large") if b in set(frame["subset"])]
    if buckets:
        measured = set(frame[frame["task"] == "summarization"]["metric"])
        shown = [m for m in ("judge_rating", "rougeL", "copy_rate") if m in measured]
        figures["figure_3_summarization"] = lambda: _panels(
            [("summarization", metric, bucket) for metric in shown for bucket in buckets],
            _quality(frame),
            columns=len(buckets),
        )
    if len(frame[(frame["task"] == "mtbench") & frame["target_skip_ratio"].notna()]):
        figures["figure_5_mtbench"] = lambda: _categories(frame)
    return figures


def main_metrics(frame: pd.DataFrame) -> list[tuple[str, str]]:
    """The metrics that stand for each task, of those that the frame has."""
    wanted = {
        "perplexity": ("perplexity", "kl", "excess_nll"),
        "continuation": ("token_agreement", "common_prefix_tokens", "collapse_rate"),
        "freebaseqa": ("exact_match", "contains_answer", "collapse_rate"),
        "summarization": ("judge_rating", "rougeL", "collapse_rate"),
        "mtbench": ("judge_rating", "collapse_rate"),
    }
    present = set(zip(frame["task"], frame["metric"], strict=True))
    return [(t, m) for t in dict.fromkeys(frame["task"]) for m in wanted.get(t, ()) if (t, m) in present]


def save_sweep_figures(frame: pd.DataFrame, folder: Path, *, overwrite: bool) -> list[Path]:
    """Draw all figures of a sweep as PNG files into `folder`; returns them."""
    written = []
    for stem, draw in sweep_figures(frame).items():
        with style():
            figure = draw()
            path = folder / f"{stem}.png"
            write_figure(figure, path, overwrite=overwrite)
        written.append(path)
    return written


def _scale(ax: Axes, metric: str) -> None:
    if metric in _LOGARITHMIC:
        ax.set_yscale("log")
    elif metric in _LINEAR_BELOW:
        ax.set_yscale("symlog", linthresh=_LINEAR_BELOW[metric])


def _quality(frame: pd.DataFrame) -> Callable[[str, str, str, Axes], Axes]:
    return lambda task, metric, subset, ax: plot_quality(
        frame, task=task, metric=metric, subset=subset, ax=ax
    )


def _panels(
    panels: list[tuple[str, str, str]], draw: Callable[[str, str, str, Axes], Axes], columns: int = 3
) -> Figure:
    import matplotlib.pyplot as plt

    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4.3 * columns, 3.4 * rows + 0.4), layout="constrained", squeeze=False
    )
    for ax, (task, metric, subset) in zip(axes.flat, panels, strict=False):
        draw(task, metric, subset, ax)
        ax.set_title(task if subset == "all" else f"{task}, {as_text(subset)}", fontsize="medium")
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")
    return figure


def _categories(frame: pd.DataFrame) -> Figure:
    import matplotlib.pyplot as plt

    rows = frame[frame["task"] == "mtbench"]
    metric = "judge_rating" if "judge_rating" in set(rows["metric"]) else "token_agreement"
    ratios = sorted(rows["target_skip_ratio"].dropna().unique())
    figure, axes = plt.subplots(
        len(ratios), 1, figsize=(10, 3.2 * len(ratios) + 0.4), layout="constrained", squeeze=False
    )
    categories = [s for s in dict.fromkeys(rows["subset"]) if s != "all"]
    for ax, ratio in zip(axes.flat, ratios, strict=True):
        at = rows[(rows["target_skip_ratio"] == ratio) | (rows["method"] == "full")]
        plot_by_subset(at, task="mtbench", metric=metric, subsets=categories, ax=ax)
        ax.set_title(f"target skip ratio {ratio:g}", fontsize="medium")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize="small")
    return figure


def _rows(frame: pd.DataFrame, task: str, metric: str, subset: str) -> pd.DataFrame:
    rows = frame[(frame["task"] == task) & (frame["metric"] == metric) & (frame["subset"] == subset)]
    if rows.empty:
        raise ConfigError(f"the frame has no metric {metric!r} of task {task!r} for {subset!r}")
    return rows


def _styles(rows: pd.DataFrame) -> list[tuple[str, Any, str]]:
    """Methods with a colour and a marker of their own, the same in every figure."""
    known = dict(
        zip(
            METHOD_ORDER,
            zip([*sns.color_palette(PALETTE), *_MORE], MARKERS, strict=True),
            strict=True,
        )
    )
    return [(m, *known[m]) for m in METHOD_ORDER if m in set(rows["method"])]
