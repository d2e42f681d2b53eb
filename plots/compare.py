"""Profiles side by side: their saturation curves, and what each is worth on other text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import seaborn as sns

from skipcal.errors import ConfigError
from skipcal.evaluation.transfer import FULL_MODEL, transfer_matrix
from skipcal.profiles.schema import SkipProfile
from skipcal.style import PALETTE, THRESHOLD, as_text, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR = 0.055  # height of a region's bar, as a fraction of the axes
_LABEL_CHARACTERS = 17  # of a text's name that fit under its column
_VALUES = {
    "realised_skip_ratio": ("skip ratio realised", ".3f"),
    "perplexity": ("perplexity", ".4g"),
}


def plot_curves(
    profiles: Mapping[str, SkipProfile], *, ax: Axes | None = None, zoom: bool = False, legend: bool = True
) -> Axes:
    """Draw one saturation curve per profile, and below them each one's skippable region as a bar.

    The thin line on either end of a bar is the bootstrap interval of `cold_s` and `cold_e`.

    ax:   where to draw; by default the current Axes.
    zoom: scale the y axis to the layers that are skippable in some profile; without the bars.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    if not profiles:
        raise ConfigError("no profile to draw")
    ax = ax or plt.gca()
    layers = max(profile.model.num_layers for profile in profiles.values())
    colours = sns.color_palette(PALETTE, len(profiles))
    for (name, profile), colour in zip(profiles.items(), colours, strict=True):
        mean = profile.layers["pooled"].mean
        sns.lineplot(x=range(len(mean)), y=mean, ax=ax, color=colour, marker="o", ms=4, label=as_text(name))
    if zoom:
        _zoom(ax, profiles)
    else:
        _draw_regions(ax, profiles, colours)
    ax.set(xlabel="layer (0-based)", ylabel="mean of cos(h, h + f)", xlim=(-0.5, layers - 0.5))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    if (drawn := ax.get_legend()) is not None:
        drawn.remove()
    if legend:
        ax.legend(fontsize="small", loc="center", bbox_to_anchor=(0.5, 0.55))
    return ax


def plot_transfer(frame: pd.DataFrame, *, value: str = "realised_skip_ratio", ax: Axes | None = None) -> Axes:
    """Draw a value of `transfer` as a heat map, profiles down and texts across.

    value: "realised_skip_ratio", coloured by the distance from the target; or "perplexity",
           coloured by its logarithm, with the full model's as the last row.
    """
    import matplotlib.pyplot as plt
    from matplotlib.colors import CenteredNorm, LogNorm

    if value not in _VALUES:
        raise ConfigError(f"value {value!r} is not one of {', '.join(_VALUES)}")
    ax = ax or plt.gca()
    label, spec = _VALUES[value]
    matrix = transfer_matrix(frame, value).astype(float)
    options: dict[str, Any] = {"cmap": "flare", "norm": LogNorm()}
    if value == "realised_skip_ratio":
        targets = frame["target_skip_ratio"].dropna().unique()
        centre = float(targets[0]) if len(targets) == 1 else float(matrix.to_numpy().mean())
        half = max(abs(matrix.to_numpy() - centre).max(), 0.02)  # a perfect matrix is not all colour
        options = {"cmap": "vlag", "norm": CenteredNorm(centre, half)}
        label += f" (target {centre:g})" if len(targets) == 1 else ""
    elif matrix.to_numpy().min() == matrix.to_numpy().max():
        options = {"cmap": "flare"}
    sns.heatmap(
        matrix.rename(index=as_text, columns=as_text),
        ax=ax,
        annot=True,
        fmt=spec,
        linewidths=1,
        cbar_kws={"label": label},
        **options,
    )
    if FULL_MODEL in matrix.index:
        ax.axhline(len(matrix) - 1, color=THRESHOLD, lw=1.5)
    ax.set(xlabel="text", ylabel="profile")
    ax.tick_params(axis="y", rotation=0)
    lines = [as_text(str(name)).replace(":", ":\n") for name in matrix.columns]
    crowded = max(len(part) for line in lines for part in line.split("\n")) > _LABEL_CHARACTERS
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if crowded else {}
    ax.set_xticks(ax.get_xticks(), lines, **turned)
    ax.grid(visible=False)
    return ax


def curves_figure(profiles: Mapping[str, SkipProfile]) -> Figure:
    """All layers with the regions, and beside them the skippable layers enlarged."""
    import matplotlib.pyplot as plt

    with style():
        figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        plot_curves(profiles, ax=whole)
        plot_curves(profiles, ax=near, zoom=True, legend=False)
        whole.set_title("all layers; bars: skippable regions with bootstrap intervals", fontsize="medium")
        near.set_title("the skippable layers", fontsize="medium")
        model = next(iter(profiles.values())).model
        figure.suptitle(f"{as_text(model.name)}: saturation curves by calibration data", fontsize="medium")
    return figure


def save_curves(profiles: Mapping[str, SkipProfile], path: Path, *, overwrite: bool) -> None:
    """Write `curves_figure` to a file."""
    write_figure(curves_figure(profiles), path, overwrite=overwrite)


def save_transfer(frame: pd.DataFrame, path: Path, *, value: str, overwrite: bool) -> None:
    """Write `plot_transfer` to a file."""
    import matplotlib.pyplot as plt

    rows, columns = frame["profile"].nunique(), frame["text"].nunique()
    with style():
        size = (3.0 + 1.35 * columns, 1.9 + 0.55 * rows)
        figure, ax = plt.subplots(figsize=size, layout="constrained")
        plot_transfer(frame, value=value, ax=ax)
        ax.set_title(f"{_VALUES[value][0]}: profile by text", fontsize="medium")
    write_figure(figure, path, overwrite=overwrite)


def _draw_regions(ax: Axes, profiles: Mapping[str, SkipProfile], colours: list[Any]) -> None:
    """Bars at the foot of the axes, the first profile's on top; below them no curve is hidden."""
    place = ax.get_xaxis_transform()  # x in layers, y as a fraction of the axes
    for row, (profile, colour) in enumerate(zip(profiles.values(), colours, strict=True)):
        policy, regions = profile.cosine_policy, profile.regions
        middle = BAR * (len(profiles) - row)
        ax.barh(
            middle,
            policy.cold_e - policy.cold_s,
            left=policy.cold_s - 0.5,
            height=0.6 * BAR,
            color=colour,
            alpha=0.7,
            transform=place,
        )
        for interval in (regions.cold_s_interval, regions.cold_e_interval):
            if interval is not None:
                ends = [interval[0] - 0.5, interval[1] - 0.5]
                ax.plot(ends, [middle, middle], color=colour, lw=1.2, marker="|", ms=6, transform=place)
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ax.get_yticks() if low <= tick <= high])  # none beside the bars
    share = BAR * (len(profiles) + 1)
    ax.set_ylim(high - (high - low) / (1 - share), high)


def _zoom(ax: Axes, profiles: Mapping[str, SkipProfile]) -> None:
    """Fit the y axis to the layers within any region."""
    values = [
        mean
        for profile in profiles.values()
        for mean in profile.layers["pooled"].mean[profile.cosine_policy.cold_s : profile.cosine_policy.cold_e]
    ]
    if values:
        margin = 0.08 * max(max(values) - min(values), 1e-3)
        ax.set_ylim(min(values) - margin, min(max(values) + margin, 1.0))
