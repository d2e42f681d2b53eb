"""The saturation curve of a profile, after figure 2 of FFN-SkipLLM (arXiv 2404.03865)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns

from skipcal.profiles.data import ProfileData
from skipcal.style import (
    BAND_ALPHA,
    COLD,
    PALETTE,
    REGION_ALPHA,
    SKIPPABLE,
    THRESHOLD,
    as_text,
    check_figure,
    style,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = ("q25", "q75")


def plot_saturation(
    profile: ProfileData | pd.DataFrame,
    *,
    ax: Axes | None = None,
    zoom: bool = False,
    legend: bool = True,
) -> Axes:
    """Draw the mean of `cos_i` by layer and corpus, with the band of its middle half of tokens.

    profile: a profile, or what its `to_frame()` gave (then without regions and threshold).
    ax:      where to draw; by default the current Axes.
    zoom:    scale the y axis to the skippable region, in which all curves are close to 1.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    frame = profile.to_frame() if isinstance(profile, ProfileData) else profile
    ax = ax or plt.gca()
    corpora = [name for name in frame["corpus"].unique() if name != "pooled"] or ["pooled"]
    wide = frame.pivot_table(index=["corpus", "layer"], columns="stat", values="value")
    for corpus, colour in zip(corpora, sns.color_palette(PALETTE, len(corpora)), strict=True):
        curve = wide.loc[corpus]
        options = {"color": colour, "marker": "o", "ms": 4, "label": as_text(corpus)}
        sns.lineplot(x=curve.index, y=curve["mean"], ax=ax, **options)
        ax.fill_between(curve.index, curve[BAND[0]], curve[BAND[1]], color=colour, alpha=BAND_ALPHA, lw=0)
    layers = int(frame["layer"].max()) + 1
    if isinstance(profile, ProfileData):
        _draw_regions(profile, ax, layers)
    if zoom:
        _zoom(ax, wide.loc[corpora], profile if isinstance(profile, ProfileData) else None)
    ax.set(xlabel="layer (0-based)", ylabel="cos(h, h + f)", xlim=(-0.5, layers - 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend:
        ax.legend(loc="lower center", fontsize="small")
    elif (drawn := ax.get_legend()) is not None:
        drawn.remove()
    return ax


def saturation_figure(profile: ProfileData) -> Figure:
    """The whole curve, and beside it the skippable region enlarged."""
    import matplotlib.pyplot as plt

    with style():
        figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        plot_saturation(profile, ax=whole)
        plot_saturation(profile, ax=near, zoom=True, legend=False)
        whole.set_title("all layers", fontsize="medium")
        near.set_title("the skippable region", fontsize="medium")
        pooled = profile.layers["pooled"].count[0]
        part = "generated" if profile.calibration.mode == "generate" else "text"
        figure.suptitle(
            f"{as_text(profile.model.name)}: mean cosine of the residual stream before and after each FFN\n"
            f"{pooled:,} {part} tokens; bands: middle half of the tokens",
            fontsize="medium",
        )
    return figure


def save_figure(profile: ProfileData, path: Path, *, overwrite: bool) -> None:
    """Draw the profile's saturation curve into a PNG, SVG or PDF file."""
    check_figure(path, overwrite=overwrite)
    write_figure(saturation_figure(profile), path, overwrite=overwrite)


def _draw_regions(profile: ProfileData, ax: Axes, layers: int) -> None:
    policy = profile.cosine_policy
    for start, end in ((0, policy.cold_s), (policy.cold_e, layers)):
        ax.axvspan(start - 0.5, end - 0.5, color=COLD, alpha=REGION_ALPHA, lw=0, label="_cold")
    ax.axvspan(
        policy.cold_s - 0.5,
        policy.cold_e - 0.5,
        color=SKIPPABLE,
        alpha=REGION_ALPHA,
        lw=0,
        label=f"skippable [{policy.cold_s}, {policy.cold_e})",
    )
    ax.patches[-2].set_label("cold")
    if policy.threshold <= 1:
        ax.axhline(
            policy.threshold,
            color=THRESHOLD,
            ls="--",
            lw=1,
            label=f"threshold {policy.threshold:.4f}",
        )


def _zoom(ax: Axes, wide: pd.DataFrame, profile: ProfileData | None) -> None:
    """Fit the y axis to the middle layers, with the threshold in sight."""
    layer = wide.index.get_level_values("layer")
    first, last = (
        (profile.cosine_policy.cold_s, profile.cosine_policy.cold_e) if profile else (1, layer.max())
    )
    middle = wide[(layer >= first) & (layer < last)]
    low, high = middle[BAND[0]].min(), middle[BAND[1]].max()
    if profile and profile.cosine_policy.threshold <= 1:
        low, high = min(low, profile.cosine_policy.threshold), max(high, profile.cosine_policy.threshold)
    margin = 0.08 * max(high - low, 1e-3)
    ax.set_ylim(low - margin, min(high + margin, 1.0))
