"""Cold regions: where the saturation curve falls, rises and falls again.

The mean curve is fitted by three monotone pieces, falling on [0, cold_s), rising on
[cold_s, cold_e), falling on [cold_e, L), by least squares over all pairs of splits. The first
and the last FFN always stay cold: 1 <= cold_s < cold_e <= L - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import spearmanr

from skipcal.errors import ConfigError, UnsupportedModel
from skipcal.profiles.parts import Regions

BOOTSTRAP_RESAMPLES = 200
INTERVAL = (2.5, 97.5)  # percent
RISING_RHO = 0.8  # below it the middle is not called rising
NARROW_SHARE = 0.25  # of all layers; a region below it cannot give the paper's 25-30 % of skips
_EQUAL = 1e-12  # sums of squares this close, relative to the curve's spread, are one fit


@dataclass(frozen=True)
class RegionFit:
    """The best split of a curve and how well it fits. r2 is None for a flat curve."""

    cold_s: int
    cold_e: int
    r2: float | None


def fit_regions(curve: np.ndarray) -> RegionFit:
    """Fit the three pieces to a curve [layers].

    Among equal fits the widest region wins, then the smaller `cold_s`.
    Raises UnsupportedModel below three layers.
    """
    layers = len(curve)
    if layers < 3:
        raise UnsupportedModel(f"a model of {layers} layers has no skippable region; expected 3 or more")
    curve = np.asarray(curve, dtype=np.float64)
    front = _falling_errors(curve)  # of curve[:s], by s
    back = _falling_errors(-curve[::-1])[::-1]  # of curve[e:], by e: falling read backwards is rising
    spread = float(((curve - curve.mean()) ** 2).sum())
    best: tuple[float, int, int] | None = None
    for cold_s in range(1, layers - 1):
        middle = _falling_errors(-curve[cold_s:])
        for cold_e in range(cold_s + 1, layers):
            error = front[cold_s] + middle[cold_e - cold_s] + back[cold_e]
            if best is None or error < best[0] - _EQUAL * spread:
                best = (error, cold_s, cold_e)
            elif error <= best[0] + _EQUAL * spread and cold_e - cold_s > best[2] - best[1]:
                best = (min(error, best[0]), cold_s, cold_e)
    assert best is not None
    return RegionFit(cold_s=best[1], cold_e=best[2], r2=1.0 - best[0] / spread if spread > 0 else None)


def _falling_errors(values: np.ndarray) -> np.ndarray:
    """Least-squares error of the best non-increasing fit to values[:n], for n = 0..len.

    Pool adjacent violators, one value at a time: after each, the blocks are the fit of the prefix. (By
    scipy.optimize.isotonic_regression, one fit a prefix, all splits take 7 to 9 times as long.)
    """
    errors = np.zeros(len(values) + 1)
    blocks: list[tuple[float, int, float]] = []  # mean, size, squared error
    for n, value in enumerate(values.tolist(), start=1):
        mean, size, squared = value, 1, 0.0
        while blocks and blocks[-1][0] < mean:
            other_mean, other_size, other_squared = blocks.pop()
            gap = other_mean - mean
            squared += other_squared + gap * gap * size * other_size / (size + other_size)
            mean = (mean * size + other_mean * other_size) / (size + other_size)
            size += other_size
        blocks.append((mean, size, squared))
        errors[n] = sum(block[2] for block in blocks)
    return errors


def find_regions(
    curve: np.ndarray,
    prompt_sums: np.ndarray,
    prompt_counts: np.ndarray,
    *,
    seed: int,
    given: tuple[int, int] | None = None,
) -> Regions:
    """Cold regions of a mean curve [layers], with bootstrap intervals and warnings.

    prompt_sums, prompt_counts: [prompts, layers] and [prompts], the cosines' sums and numbers, from
    which the bootstrap draws prompts with replacement.
    given: (cold_s, cold_e) chosen by the user instead of the fit.
    """
    fit = fit_regions(curve)
    cold_s, cold_e = given or (fit.cold_s, fit.cold_e)
    check_region(cold_s, cold_e, len(curve))
    rho = _monotonicity(curve[cold_s:cold_e])
    intervals: tuple[tuple[int, int] | None, tuple[int, int] | None] = (None, None)
    if not given:
        intervals = region_intervals(bootstrap_regions(prompt_sums, prompt_counts, seed=seed))
    return Regions(
        cold_s=cold_s,
        cold_e=cold_e,
        method="given" if given else "isotonic",
        fit_r2=None if given else fit.r2,
        monotonicity=rho,
        cold_s_interval=intervals[0],
        cold_e_interval=intervals[1],
        warnings=_warnings(curve, cold_s, cold_e, rho),
    )


def check_region(cold_s: int, cold_e: int, num_layers: int) -> None:
    """Raise ConfigError unless the first and the last of `num_layers` layers stay cold."""
    if not 1 <= cold_s < cold_e <= num_layers - 1:
        raise ConfigError(
            f"cold_s {cold_s} and cold_e {cold_e} are no region of {num_layers} layers; "
            f"expected 1 <= cold_s < cold_e <= {num_layers - 1}"
        )


def _monotonicity(middle: np.ndarray) -> float | None:
    if len(middle) < 3 or np.ptp(middle) == 0:
        return None
    return float(np.clip(spearmanr(np.arange(len(middle)), middle).statistic, -1, 1))


def bootstrap_regions(
    prompt_sums: np.ndarray, prompt_counts: np.ndarray, *, seed: int, resamples: int = BOOTSTRAP_RESAMPLES
) -> np.ndarray:
    """`cold_s` and `cold_e` of resampled prompts, [resamples, 2].

    prompt_sums, prompt_counts: as `find_regions` takes them and `Trace.prompt_sums` gives them.
    """
    prompts = len(prompt_counts)
    draws = np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)
    curves = (draws @ prompt_sums) / (draws @ prompt_counts)[:, None]
    return np.array([(fit.cold_s, fit.cold_e) for fit in map(fit_regions, curves)])


def region_intervals(fits: np.ndarray) -> tuple[tuple[int, int], tuple[int, int]]:
    """95 % intervals of `cold_s` and `cold_e` over what `bootstrap_regions` gave."""
    low, high = np.percentile(fits, INTERVAL, axis=0, method="nearest").astype(int).tolist()
    return (low[0], high[0]), (low[1], high[1])


def _warnings(curve: np.ndarray, cold_s: int, cold_e: int, rho: float | None) -> list[str]:
    """What of the paper's premise, a rising middle, does not hold here, and what to do instead."""
    found = []
    width, layers = cold_e - cold_s, len(curve)
    if rho is None or round(rho, 2) < RISING_RHO:  # as it is shown: 4 / 5 has no exact double
        shown = "cannot be told" if rho is None else f"has Spearman's rho {rho:.2f}"
        found.append(
            f"the middle of the curve does not rise: [{cold_s}, {cold_e}) {shown}, expected {RISING_RHO} "
            "or more. Early cosines say little about later layers here; bound max_skips to 2 or 3, and "
            "compare with random skipping at the same ratio before trusting this policy"
        )
    if width < NARROW_SHARE * layers:
        found.append(
            f"the skippable region [{cold_s}, {cold_e}) holds {width} of {layers} layers: at most "
            f"{max(width - 1, 0) / layers:.2f} of the FFNs can be skipped. To try a wider one, give "
            "--cold-s and --cold-e"
        )
    return found
