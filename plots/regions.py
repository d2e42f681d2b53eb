"""How sure the cold regions are: where they end in resampled prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import seaborn as sns

from skipcal.calibrate.regions import BOOTSTRAP_RESAMPLES, bootstrap_regions, region_intervals
from skipcal.errors import ConfigError
from skipcal.style import PALETTE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from skipcal.calibrate.saturation import Trace

BAR = 0.4  # width of a bar; two stand side by side in a layer


def plot_region_bootstrap(
    traces: Sequence[Trace], *, seed: int = 0, resamples: int = BOOTSTRAP_RESAMPLES, ax: Axes | None = None
) -> Axes:
    """Draw in which share of resampled prompts each layer is `cold_s`, and in which it is `cold_e`.

    The prompts of all traces are drawn together, with replacement, as the intervals of a profile are; the
    legend tells the 95 % intervals.

    traces: what `calibrate_model` gave beside the profile.
    ax:     where to draw; by default the current Axes.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not traces:
        raise ConfigError("no trace to draw prompts from; pass the traces of calibrate_model")
    ax = ax or plt.gca()
    sums, counts = (np.concatenate(parts) for parts in zip(*(t.prompt_sums() for t in traces), strict=True))
    fits = bootstrap_regions(sums, counts, seed=seed, resamples=resamples)  # [resamples, 2]
    layers = sums.shape[1]
    for column, (name, side) in enumerate((("cold_s", -0.5), ("cold_e", 0.5))):
        share = np.bincount(fits[:, column], minlength=layers) / len(fits)
        low, high = region_intervals(fits)[column]
        ax.bar(
            np.arange(layers) + side * BAR,
            share,
            width=BAR,
            color=sns.color_palette(PALETTE)[column],
            label=f"{name}, 95 % interval {low} to {high}",
        )
    ax.set(xlabel="layer (0-based)", ylabel="share of resamples", xlim=(-0.5, layers - 0.5))
    ax.set_ylim(0, 1.45)  # the legend stands above the bars
    ax.set_yticks([0, 0.5, 1])
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="upper right", fontsize="small")
    return ax
