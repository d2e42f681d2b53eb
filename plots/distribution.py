"""How the cosines of single tokens are spread in each layer, behind the mean of the saturation curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skipcal.errors import ConfigError, suggestion
from skipcal.profiles.parts import HISTOGRAM_BINS
from skipcal.profiles.schema import SkipProfile
from skipcal.style import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_cosine_distribution(
    profile: SkipProfile, *, corpus: str = "pooled", ax: Axes | None = None, colorbar: bool = True
) -> Axes:
    """Draw which share of the tokens has which `cos_i`, a column a layer, and the median as a line.

    The shares of a column add up to 1; they are those of the profile's histogram, whose bins are
    2 / HISTOGRAM_BINS = 0.01 wide. Empty bins stay blank, the colours are logarithmic. The y axis begins
    at the lowest bin with a token in it.

    corpus:   one of the profile's, or "pooled".
    ax:       where to draw; by default the current Axes.
    colorbar: draw the scale of the shares beside the Axes.
    Raises ConfigError for a corpus that the profile does not have.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    if corpus not in profile.layers:
        raise ConfigError(
            f"corpus {corpus!r} is not in this profile; {suggestion(corpus, list(profile.layers))}"
        )
    ax = ax or plt.gca()
    statistics = profile.layers[corpus]
    counts = np.array(statistics.histogram, dtype=np.float64)  # [layers, bins]
    shares = counts / counts.sum(axis=1, keepdims=True)
    edges = np.linspace(-1.0, 1.0, HISTOGRAM_BINS + 1)
    lowest = int(np.flatnonzero(counts.sum(axis=0))[0])
    layers = len(counts)
    mesh = ax.pcolormesh(
        np.arange(layers + 1) - 0.5,
        edges[lowest:],
        np.ma.masked_equal(shares[:, lowest:].T, 0.0),
        cmap="viridis",
        norm=LogNorm(shares[shares > 0].min(), 1.0),
    )
    ax.plot(range(layers), statistics.q50, color=THRESHOLD, marker=".", ms=4, lw=1, label="median")
    ax.set(
        xlabel="layer (0-based)", ylabel="cos(h, h + f)", xlim=(-0.5, layers - 0.5), ylim=(edges[lowest], 1)
    )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=False)
    ax.legend(loc="lower center", fontsize="small", frameon=True)
    if colorbar:
        ax.figure.colorbar(mesh, ax=ax, pad=0.01).set_label("share of the layer's tokens, per bin of 0.01")
    return ax
