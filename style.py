"""The one place for colours and sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipcal.errors import ConfigError
from skipcal.files.writing import check_output, write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLD = "#d62728"
SKIPPABLE = "#ffd92f"
THRESHOLD = "#333333"
REGION_ALPHA = 0.14
BAND_ALPHA = 0.22
PALETTE = "colorblind"
MARKERS = ("o", "s", "D", "^", "v", "P", "*", "X", "<", ">", "h", "p", "d")

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
# The same figure gives the same file: no dates inside.
_NO_DATE = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}

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
    """Draw in skipcal's style inside, and leave matplotlib's settings as they were.

    One setting stays: a session's first figure starts the backend, and a notebook's backend shows what is
    drawn only while it is interactive, which it switches on itself.
    """
    import matplotlib.pyplot as plt

    interactive = plt.isinteractive()
    try:
        with plt.rc_context(_RC):
            try:
                yield
            finally:
                interactive = plt.isinteractive()
    finally:
        plt.rcParams["interactive"] = interactive


def as_text(name: str) -> str:
    """A name that anybody chose, as a figure shows it.

    Between two `$` matplotlib would read a formula, and what begins with `_` is not in a legend.
    """
    shown = name.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def check_figure(path: Path, *, overwrite: bool) -> None:
    """Raise early, before long work, when no figure could be written there at its end.

    Raises ConfigError for another ending, else as `check_output`.
    """
    if path.suffix.lower() not in FIGURE_SUFFIXES:
        raise ConfigError(f"figure {path}: ending {path.suffix!r} is not one of {', '.join(FIGURE_SUFFIXES)}")
    check_output(path, overwrite=overwrite)


def write_figure(figure: Figure, path: Path, *, overwrite: bool) -> None:
    """Write a figure into a file, in skipcal's style and atomically, and close it."""
    import matplotlib.pyplot as plt

    def draw(partial: Path) -> None:
        with style():
            figure.savefig(partial, metadata=_NO_DATE.get(path.suffix.lower()))

    try:
        write_atomic(path, draw, overwrite=overwrite)
    finally:
        plt.close(figure)
