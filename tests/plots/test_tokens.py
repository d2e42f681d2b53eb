"""The heat map and the coloured text show the map's numbers."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import AxesImage
from token_maps import made_map

from skipcal.errors import ConfigError
from skipcal.plots.tokens import FULL_MODEL_ALPHA, plot_tokens, region_edges, tokens_html


@pytest.fixture
def ax() -> Any:
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_cells_dots_edges_and_labels_are_the_maps(ax: Any) -> None:
    tokens = made_map()
    assert plot_tokens(tokens, ax=ax) is ax
    picture = next(image for image in ax.images if isinstance(image, AxesImage))
    np.testing.assert_array_equal(np.asarray(picture.get_array()), tokens.cosine.T)
    assert picture.get_clim()[1] == 1.0
    alpha: Any = picture.get_alpha()
    assert alpha[:, 3:].min() == 1 and alpha[:, :3].max() == FULL_MODEL_ALPHA
    dots = np.asarray(ax.collections[0].get_offsets()).astype(int)
    assert sorted(dots.tolist()) == np.argwhere(tokens.skipped).tolist()
    edges = [np.asarray(line.get_ydata())[0] for line in ax.lines if line.get_linestyle() == "--"]
    assert edges == [0.5, 3.5]
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert labels == ["<s>", "a $x^", " <b>&\"'", "⏎", "⋯", "□", "␣", "�⇥|", "$"]
    assert [text.get_text() for text in ax.texts] == ["prompt", "warm-up", "decoded"]
    ax.figure.canvas.draw()  # no formula is seen in a single dollar, and no glyph is missing


def test_a_part_of_the_text_can_be_drawn(ax: Any) -> None:
    tokens = made_map()
    plot_tokens(tokens, ax=ax, start=3, stop=7, colorbar=False)
    np.testing.assert_array_equal(np.asarray(ax.images[0].get_array()), tokens.cosine[3:7].T)
    assert len(ax.get_xticklabels()) == 4 and len(ax.figure.axes) == 1
    assert len(np.asarray(ax.collections[0].get_offsets())) == tokens.skipped[3:7].sum()
    for start, stop in ((4, 4), (-1, 3), (0, 10)):
        with pytest.raises(ConfigError, match="are not within the text's 9"):
            plot_tokens(tokens, ax=ax, start=start, stop=stop)


def test_edges_are_those_of_each_run_of_layers() -> None:
    assert region_edges((1, 2, 3, 6, 8, 9)) == [0.5, 3.5, 5.5, 6.5, 7.5, 9.5]
    assert region_edges(()) == []


class Spans(HTMLParser):
    """Text and attributes of the tokens' spans, as a browser would read them."""

    def __init__(self, document: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self._within = False
        self.tags: set[str] = set()
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        if tag == "span" and "title" in given:
            self.found.append((given, ""))
            self._within = True

    def handle_data(self, data: str) -> None:
        if self._within:
            self.found[-1] = (self.found[-1][0], self.found[-1][1] + data)

    def handle_endtag(self, tag: str) -> None:
        self._within = False


def test_the_text_is_whole_and_each_background_is_a_share() -> None:
    tokens = made_map()
    page = Spans(tokens_html(tokens))
    assert "".join(text for _, text in page.found) == tokens.text.replace("\x00", "\ufffd")
    strengths = []
    for attributes, _ in page.found:
        match = re.search(r"rgba\(230,110,0,([\d.]+)\)", str(attributes["style"]))
        assert match
        strengths.append(float(match[1]))
    assert strengths == pytest.approx([0.62 * share for share in tokens.shares], abs=1e-3)
    assert {n for n, strength in enumerate(strengths) if strength} == set(range(3, 9)) - {
        int(n) for n in np.flatnonzero(tokens.skipped.sum(1) == 0)
    }
    classes = [str(attributes["class"]).split() for attributes, _ in page.found]
    assert [c[0] for c in classes] == ["prompt"] * 2 + ["warm-up"] + ["decoded"] * 6
    titles = [str(attributes["title"]) for attributes, _ in page.found]
    assert titles[0] == "token 0 '<s>': prompt: full model"
    assert titles[2].endswith("warm-up: full model")
    assert titles[3] == "token 3 '⏎': 3 of at most 3 FFNs skipped: layers 1 to 3"


def test_no_text_becomes_markup() -> None:
    hostile = ("x", '"><script>alert(1)</script>', "' onmouseover='alert(1)", "</span></style>", "&lt;")
    page = Spans(tokens_html(made_map(hostile)))
    assert page.tags == {"style", "div", "span"}
    assert [text for _, text in page.found] == list(hostile)
    assert all(set(attributes) == {"class", "style", "title"} for attributes, _ in page.found)
