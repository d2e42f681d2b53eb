"""The bars are the counts of the bootstrap."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.container import BarContainer

from skipcal.calibrate.regions import fit_regions
from skipcal.calibrate.saturation import Trace
from skipcal.calibrate.trace_store import Held
from skipcal.errors import ConfigError
from skipcal.plots.regions import plot_region_bootstrap

LAYERS, PROMPTS, TOKENS = 8, 5, 3


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def trace(corpus: str, *, seed: int, noise: float) -> Trace:
    """Cosines that fall on [0, 2), rise on [2, 6) and fall again, with noise for each token."""
    curve = np.array([0.5, 0.3, 0.6, 0.7, 0.8, 0.9, 0.6, 0.2])
    draw = np.random.default_rng(seed)
    cosine = curve[:, None] + noise * draw.standard_normal((LAYERS, PROMPTS * TOKENS))
    arrays = {
        "prompt": np.repeat(np.arange(PROMPTS, dtype=np.int32), TOKENS),
        "position": np.tile(np.arange(TOKENS, dtype=np.int32), PROMPTS),
        "cosine": cosine.astype(np.float32),
        "norm_ratio": np.ones((LAYERS, PROMPTS * TOKENS), np.float32),
    }
    return Trace(corpus=corpus, prompt_tokens=1, parts=[Held(arrays)])


def test_bars_are_the_shares_of_the_resamples_with_that_layer() -> None:
    traces = [trace("a", seed=0, noise=0.4), trace("b", seed=1, noise=0.4)]
    _, ax = plt.subplots()
    assert plot_region_bootstrap(traces, seed=3, resamples=50, ax=ax) is ax

    per_prompt = [
        t.cosine[t.prompt == prompt].astype(np.float64).mean(axis=0) for t in traces for prompt in range(5)
    ]
    draws = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=50)
    found = [fit_regions(np.average(per_prompt, axis=0, weights=weights)) for weights in draws]
    expected = (Counter(fit.cold_s for fit in found), Counter(fit.cold_e for fit in found))
    assert len(expected[1]) > 1  # or the bars would tell nothing
    bars = [c for c in ax.containers if isinstance(c, BarContainer)]
    for side, drawn, counts in zip((-0.2, 0.2), bars, expected, strict=True):
        heights = [patch.get_height() for patch in drawn.patches]
        assert heights == pytest.approx([counts[layer] / 50 for layer in range(LAYERS)])
        middles = [patch.get_x() + patch.get_width() / 2 for patch in drawn.patches]
        assert middles == pytest.approx([layer + side for layer in range(LAYERS)])


def test_without_noise_all_resamples_agree_and_the_legend_says_so() -> None:
    _, ax = plt.subplots()
    plot_region_bootstrap([trace("a", seed=0, noise=0.0)], resamples=10, ax=ax)
    legend = ax.get_legend()
    assert legend is not None
    region = fit_regions(np.array([0.5, 0.3, 0.6, 0.7, 0.8, 0.9, 0.6, 0.2]))
    assert [text.get_text() for text in legend.get_texts()] == [
        f"cold_s, 95 % interval {region.cold_s} to {region.cold_s}",
        f"cold_e, 95 % interval {region.cold_e} to {region.cold_e}",
    ]
    assert (region.cold_s, region.cold_e) == (1, 6)


def test_no_trace_is_refused() -> None:
    with pytest.raises(ConfigError, match="no trace"):
        plot_region_bootstrap([])
