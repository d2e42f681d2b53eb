"""The image of the cosines is the profile's histogram."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.collections import QuadMesh

from skipcal.errors import ConfigError
from skipcal.plots.distribution import plot_cosine_distribution
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.sources import shipped_profiles


@pytest.fixture
def profile() -> SkipProfile:
    return SkipProfile.load(shipped_profiles()[0])


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.mark.parametrize("corpus", ["pooled", "c4"])
def test_every_cell_is_the_share_of_a_layers_tokens_in_a_bin(profile: SkipProfile, corpus: str) -> None:
    _, ax = plt.subplots()
    assert plot_cosine_distribution(profile, corpus=corpus, ax=ax) is ax
    mesh = next(c for c in ax.collections if isinstance(c, QuadMesh))
    drawn: np.ndarray = np.ma.filled(np.ma.asarray(mesh.get_array()), 0.0)  # [bins, layers]
    corners = np.asarray(mesh.get_coordinates())  # [bins + 1, layers + 1, 2]
    statistics = profile.layers[corpus]
    lowest = min(place for row in statistics.histogram for place, count in enumerate(row) if count)
    assert drawn.shape == (200 - lowest, profile.model.num_layers)
    for layer, row in enumerate(statistics.histogram):
        assert corners[0, layer, 0] == layer - 0.5
        for place, count in enumerate(row[lowest:]):
            assert drawn[place, layer] == pytest.approx(count / statistics.count[layer], abs=1e-12)
    np.testing.assert_allclose(corners[:, 0, 1], [-1 + 0.01 * n for n in range(lowest, 201)])
    np.testing.assert_allclose(drawn.sum(axis=0), 1.0)


def test_the_line_is_the_median_and_nothing_drawn_is_cut_off(profile: SkipProfile) -> None:
    _, ax = plt.subplots()
    plot_cosine_distribution(profile, ax=ax, colorbar=False)
    (line,) = ax.lines
    np.testing.assert_allclose(np.asarray(line.get_ydata()), profile.layers["pooled"].q50)
    low, high = ax.get_ylim()
    assert high == 1
    assert low <= min(profile.layers["pooled"].min) < low + 0.01
    assert ax.get_xlim() == (-0.5, profile.model.num_layers - 0.5)
    assert len(ax.figure.axes) == 1  # no scale beside it


def test_a_corpus_it_does_not_have_is_refused(profile: SkipProfile) -> None:
    with pytest.raises(ConfigError, match="corpus 'wikitex' is not in this profile; did you mean 'wikitext'"):
        plot_cosine_distribution(profile, corpus="wikitex")
