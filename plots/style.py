"""The one place for colours and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcal.profiles.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLD = "#d62728"
SKIPPABLE = "#ffd92f"
THRESHOLD = "#333333"
REGION_ALPHA = 0.14
BAND_ALPHA = 0.22
PALETTE = "colorblind"

_RC: dict[Any, Any] = {
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.dpi": 120,
    "font.size": 10,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "skipcal",  # the same figure gives the same file
}


@contextmanager
def style() -> Iterator[None]:
    """Draw in skipcal's style inside, and leave matplotlib's settings as they were."""
    import matplotlib.pyplot as plt

    with plt.rc_context(_RC):
        yield


def write_figure(
    figure: Figure, path: Path, *, overwrite: bool, metadata: dict[str, Any] | None = None
) -> None:
    """Write a figure into a file, in skipcal's style and atomically, and close it.

    metadata: as matplotlib's savefig takes it.
    """
    import matplotlib.pyplot as plt

    def draw(partial: Path) -> None:
        with style():
            figure.savefig(partial, metadata=metadata)

    try:
        write_atomic(path, draw, overwrite=overwrite)
    finally:
        plt.close(figure)
