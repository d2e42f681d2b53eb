"""What each token of a text skips: a heat map of layers by tokens, and the text itself as HTML."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from skipcal.errors import ConfigError
from skipcal.evaluation.token_map import TokenMap
from skipcal.profiles.summary import ranges
from skipcal.style import THRESHOLD

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SKIPPED = "#d62728"
FULL_MODEL_ALPHA = 0.4  # of the columns that no policy applies to
_LOWEST = 0.02  # quantile of the cosines shown at which colours begin: the cold ends would take all of them
_MARKED = {"\n": "⏎", "\t": "⇥", "": "⋯"}


def plot_tokens(
    tokens: TokenMap,
    *,
    ax: Axes | None = None,
    start: int = 0,
    stop: int | None = None,
    colorbar: bool = True,
) -> Axes:
    """Draw `cos_i` of the full model as colour, layers by tokens, and a dot where the FFN is skipped.

    Columns of the prompt and of the warm-up are faint; lines border the layers that may be skipped.

    ax:          where to draw; by default the current Axes. 30 to 60 tokens can be read across 12 inches.
    start, stop: the tokens to draw, `[start, stop)`.
    colorbar:    draw the scale of the cosines beside the Axes.
    Raises ConfigError for a range without a token.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    end = len(tokens.ids) if stop is None else stop
    if not 0 <= start < end <= len(tokens.ids):
        raise ConfigError(f"tokens [{start}, {end}) are not within the text's {len(tokens.ids)}")
    ax = ax or plt.gca()
    cosine, skipped = tokens.cosine[start:end].T, tokens.skipped[start:end].T  # [layers, tokens]
    parts = tokens.parts[start:end]
    alpha = np.where([part == "decoded" for part in parts], 1.0, FULL_MODEL_ALPHA)
    picture = ax.imshow(
        cosine,
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        cmap="viridis",
        vmin=scale_start(tokens),
        vmax=1.0,
        alpha=np.broadcast_to(alpha, cosine.shape),
    )
    layer, token = np.nonzero(skipped)
    ax.scatter(token, layer, s=7, c=SKIPPED, edgecolors="white", linewidths=0.3, label="FFN skipped")
    for edge in region_edges(tokens.layers):
        ax.axhline(edge, color=THRESHOLD, lw=1, ls="--")
    _name_parts(ax, parts)
    ax.set_xticks(
        range(end - start), _drawable(tokens.pieces[start:end]), rotation=90, fontsize=7, parse_math=False
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="token", ylabel="layer (0-based)")
    ax.grid(visible=False)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=7, borderpad=0)
    if colorbar:
        bar = ax.figure.colorbar(picture, ax=ax, extend="min", pad=0.01)
        bar.set_label("cos(h, h + f) of the full model")
    return ax


def scale_start(tokens: TokenMap) -> float:
    """The cosine at which the colours begin: few of the layers that may be skipped lie below it."""
    shown = tokens.cosine[:, list(tokens.layers)] if tokens.layers else tokens.cosine
    return min(float(np.quantile(shown, _LOWEST)), 0.999)


def region_edges(layers: Sequence[int]) -> list[float]:
    """Where runs of layers begin and end, on an axis on which layer i reaches from i - 0.5 to i + 0.5."""
    within = set(layers)
    starts = [layer - 0.5 for layer in layers if layer - 1 not in within]
    ends = [layer + 0.5 for layer in layers if layer + 1 not in within]
    return sorted(starts + ends)


def tokens_html(tokens: TokenMap) -> str:
    """The text as HTML in which the background of each token tells the share of its FFNs that it skipped.

    The share is of the most that the policy could skip for one token; a tooltip names the layers. Tokens
    of the prompt have a dotted line below them, those of the warm-up a dashed one. It brings its own
    style, follows the colours around it, and loads nothing.

        IPython.display.HTML(tokens_html(tokens))
    """
    spans = "".join(
        f'<span class="{_classes(part, piece)}" style="background:{_background(share)}" '
        f'title="{html.escape(told)}">{html.escape(_harmless(piece))}</span>'
        for piece, part, share, told in zip(
            tokens.pieces, tokens.parts, tokens.shares, token_notes(tokens), strict=True
        )
    )
    legend = "".join(
        f'<span style="background:{_background(share)}">&ensp;{share:g}&ensp;</span>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f"<style>{_STYLE}</style>"
        f'<div class="skipcal-tokens"><div class="skipcal-text">{spans}</div>'
        f'<div class="skipcal-legend"><span>skipped, of at most {tokens.most_skips} FFNs a token: {legend}'
        '</span> <span class="prompt">prompt</span> <span class="warm-up">warm-up</span> '
        "(both by the full model)</div></div>"
    )


def token_notes(tokens: TokenMap) -> list[str]:
    """What happened to each token, in words."""
    notes = []
    for number, (piece, part, skipped) in enumerate(
        zip(tokens.pieces, tokens.parts, tokens.skipped, strict=True)
    ):
        layers = [int(layer) for layer in np.flatnonzero(skipped)]
        if part != "decoded":
            what = f"{part}: full model"
        elif layers:
            what = f"{len(layers)} of at most {tokens.most_skips} FFNs skipped: layers {ranges(layers)}"
        else:
            what = "no FFN skipped"
        notes.append(f"token {number} {label(piece)!r}: {what}")
    return notes


_STYLE = """\
.skipcal-text{white-space:pre-wrap;overflow-wrap:anywhere;line-height:2;font-family:ui-monospace,monospace}
.skipcal-text span{unicode-bidi:isolate;border-radius:2px;padding:.15em 0;margin-right:1px}
.skipcal-tokens .prompt{border-bottom:2px dotted;opacity:.65}
.skipcal-tokens .warm-up{border-bottom:2px dashed;opacity:.8}
.skipcal-text .line::before{content:"\\23ce";opacity:.5}
.skipcal-text .part::before{content:"\\22ef";opacity:.5}
.skipcal-legend{margin-top:.6em;font-size:.85em}"""


def _classes(part: str, piece: str) -> str:
    """Which lines a token has, and a mark where a reader would see nothing."""
    marks = {"": " part"}.get(piece, " line" if piece.startswith("\n") else "")
    return part + marks


def _background(share: float) -> str:
    """Orange, the stronger the more is skipped; text stays readable on it in the dark and in the light."""
    return f"rgba(230,110,0,{0.62 * share:.3f})"


def label(piece: str) -> str:
    """A piece of text as a label: white space and parts of a character can be seen."""
    if piece in _MARKED:
        return _MARKED[piece]
    marked = "".join(_MARKED.get(c, c) for c in _harmless(piece))
    return marked.replace(" ", "␣") if not marked.strip() else marked


def _harmless(text: str) -> str:
    """Text without control characters, which HTML does not have."""
    return "".join(c if c in "\n\t" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in text)


def _drawable(pieces: Sequence[str]) -> list[str]:
    """Labels in the characters that the font has; a box stands for others."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known: set[int] = set()
    for family in FontProperties().get_family():
        known |= set(get_font(findfont(FontProperties(family=[family]))).get_charmap())
    labels = [label(piece) for piece in pieces]
    return ["".join(c if ord(c) in known else "□" for c in text) for text in labels]


def _name_parts(ax: Axes, parts: Sequence[str]) -> None:
    """Say above the columns which of them are the prompt, the warm-up and what was decided."""
    place: Any = ax.get_xaxis_transform()
    for part in dict.fromkeys(parts):
        first, count = parts.index(part), parts.count(part)
        narrow = count < 4 and part != "decoded"  # then the next name stands right beside it
        ax.axvline(first - 0.5, color=THRESHOLD, lw=0.8)
        ax.text(first - 0.4, 1.04 if narrow else 1.01, part, transform=place, fontsize=7)
