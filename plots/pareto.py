"""Figure of a search: divergence from the full model against skip ratio, a line a rule."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import seaborn as sns

from skipcal.errors import ConfigError
from skipcal.profiles.schema import SkipProfile
from skipcal.style import MARKERS, PALETTE, THRESHOLD, as_text, check_figure, style, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_pareto(profile: SkipProfile, *, ax: Axes | None = None) -> Axes:
    """Draw KL to the full model over the skip ratio of all decoded tokens, a line a rule.

    Random skipping is dashed, the budget dotted, the chosen point circled. Raises ConfigError for a
    profile that was never tuned.
    """
    import matplotlib.pyplot as plt

    if profile.tuning is None:
        raise ConfigError("this profile was not tuned; run: skipcal tune --profile FILE --max-kl 0.05")
    ax = ax or plt.gca()
    frame = pd.DataFrame([point.model_dump() for point in profile.tuning.points])
    frame["name"] = frame["line"]
    if frame["warm_up_tokens"].nunique() > 1:
        frame["name"] += ", warm-up " + frame["warm_up_tokens"].astype(str)
    names = list(dict.fromkeys(frame["name"]))
    for place, (name, colour) in enumerate(zip(names, sns.color_palette(PALETTE, len(names)), strict=True)):
        line = frame[frame["name"] == name].sort_values("skip_ratio_all")
        random = bool((line["rule"] == "random").all())
        ax.errorbar(
            line["skip_ratio_all"], line["kl"],
            yerr=(line["kl"] - line["kl_low"], line["kl_high"] - line["kl"]),
            color=THRESHOLD if random else colour, ls="--" if random else "-",
            marker=MARKERS[place % len(MARKERS)], ms=4, lw=1.3, elinewidth=0.8, capsize=2, label=name,
        )  # fmt: skip
    chosen = profile.tuning.points[profile.tuning.chosen]
    ax.plot(chosen.skip_ratio_all, chosen.kl, "o", ms=13, mfc="none", mec=THRESHOLD, mew=1.4, label="chosen")
    if profile.tuning.budget.max_kl is not None:
        ax.axhline(profile.tuning.budget.max_kl, color=THRESHOLD, ls=":", lw=1, label="budget")
    ax.set_yscale("log")
    ax.set(xlabel="skip ratio, all decoded tokens", ylabel="KL to the full model (nats/token)")
    ax.legend(fontsize=8)
    return ax


def save_pareto(profile: SkipProfile, path: Path, *, overwrite: bool = False) -> None:
    """Draw `plot_pareto` into a PNG, SVG or PDF file."""
    import matplotlib.pyplot as plt

    check_figure(path, overwrite=overwrite)
    with style():
        figure, ax = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        plot_pareto(profile, ax=ax)
        ax.set_title(as_text(profile.model.name), fontsize=10)
        write_figure(figure, path, overwrite=overwrite)
