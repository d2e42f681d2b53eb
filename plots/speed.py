"""Speed-up by skip ratio, with the line that bytes allow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import seaborn as sns

from skipcal.errors import ConfigError
from skipcal.speed.table import machine, to_frame
from skipcal.style import BAND_ALPHA, PALETTE, THRESHOLD, as_text, check_figure, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_AT_ZERO = "watching"  # the arm that takes every cosine and skips nothing


def plot_speed_up(frame: pd.DataFrame, *, ax: Axes | None = None) -> Axes:
    """Draw the speed-up over the own full model by skip ratio, a line for each batch and context.

    frame: what `skipcal.speed.table.to_frame` gave. The point at 0 is watching without skipping.
           Dashed: the ideal, if time were bytes. The bands are the range of the rounds.
           Arms that did not run by their engine alone are left out.
    """
    import matplotlib.pyplot as plt

    ax = ax or plt.gca()
    shown = frame[frame["arm"].isin([_AT_ZERO, "skipping"]) & frame["comparable"]].sort_values("skip_ratio")
    if shown.empty:
        raise ConfigError("no skipping arm to draw; measure some with skipcal bench --ratios 0.1,0.25")
    cases = list(shown.groupby(["batch_size", "context_tokens"]))
    for ((batch, context), rows), colour in zip(cases, sns.color_palette(PALETTE, len(cases)), strict=True):
        x = rows["skip_ratio"]
        label = f"batch {batch}, context {context}"
        ax.plot(x, rows["speed_up_over_full"], color=colour, marker="o", ms=4, label=label)
        low, high = rows["speed_up_over_full_min"], rows["speed_up_over_full_max"]
        ax.fill_between(x, low, high, color=colour, alpha=BAND_ALPHA, lw=0)
        ax.plot(x, rows["ideal_speed_up"], color=colour, ls="--", lw=1, label=f"ideal by bytes, {label}")
    ax.axhline(1.0, color=THRESHOLD, lw=1)
    ax.set(xlabel="skip ratio (fraction of all FFN blocks)", ylabel="speed-up over the full model")
    ax.set_xlim(left=0)
    ax.legend(fontsize="small")
    return ax


def speed_figure(result: dict[str, Any]) -> Figure:
    """`plot_speed_up` of a document of `skipcal bench`, with what was measured as its title."""
    import matplotlib.pyplot as plt

    with style():
        figure, ax = plt.subplots(figsize=(7, 4.6), layout="constrained")
        plot_speed_up(to_frame(result), ax=ax)
        note = f"\n{result['note']}" if result["note"] else ""
        model = result["model"]
        ax.set_title(
            f"{as_text(model['name'])}, {model['dtype']}, {machine(result)}{note}", fontsize="medium"
        )
    return figure


def save_speed_figure(result: dict[str, Any], path: Path, *, overwrite: bool) -> None:
    """Draw a document of `skipcal bench` into a PNG, SVG or PDF file."""
    check_figure(path, overwrite=overwrite)
    write_figure(speed_figure(result), path, overwrite=overwrite)
