"""From a trace to operating points: which threshold skips how much.

A token that is armed at layer a of the region skips the FFNs after a, so with
m_j = max(cos_i, cold_s <= i < j) FFN j is skipped iff m_j >= threshold (`max_skips=None`). m does not fall
with j, so a token that skips at most k FFNs skips as many of its last k as have m_j >= threshold. Either
way the skipped FFNs are the values of one multiset that reach the threshold: the best threshold for a target
is the value of a rank in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from skipcal.calibrate.closed_loop import RealisedCurve
from skipcal.calibrate.running_maxima import RunningMaxima
from skipcal.core.policy import SkipPolicy
from skipcal.errors import TargetOutOfReach

TARGET_STEP = 0.05
_SLACK = 1e-9  # ratios are quotients of counts; 0.1 + 0.2 style rounding is no reason to refuse one
_LEAST_ANGLE = 1e-9  # 1 - cosine of tokens that are told apart: float32 ends at 6e-8
_HALVINGS = 24  # of its logarithm: a skip ratio moves by less than 0.001 in the last
_ROUNDING = 1e-12  # of a target that is itself a quotient of counts


def predicted_skip_ratio(cosine: np.ndarray, policy: SkipPolicy) -> float:
    """Skip ratio of `policy` on a clean trace, cosines [tokens, layers] past the warm-up."""
    region = cosine[:, policy.cold_s : policy.cold_e - 1]  # the last FFN of the region arms nothing
    if not region.size:
        return 0.0
    saturated = region >= np.float32(policy.threshold)
    armed_at = np.where(saturated.any(axis=1), saturated.argmax(axis=1), region.shape[1])
    skips = region.shape[1] - armed_at
    if policy.max_skips is not None:
        skips = np.minimum(skips, policy.max_skips)
    return float(skips.sum(dtype=np.int64) / cosine.size)


class Prediction:
    """Skip ratios that a clean trace predicts for the region and the bounds of a policy.

    blocks: called for each pass over the trace, gives cosines [layers of `arming_layers`, tokens] float32
            of the tokens past the warm-up.
    """

    def __init__(
        self, blocks: Callable[[], Iterable[np.ndarray]], policy: SkipPolicy, num_layers: int
    ) -> None:
        """Make one pass over the trace. The threshold of `policy` is not looked at."""
        self.policy, self.num_layers = policy, num_layers
        self._maxima = RunningMaxima(blocks, policy.max_skips)

    @property
    def tokens(self) -> int:
        """Number of tokens past the warm-up."""
        return self._maxima.tokens

    def skip_ratio(self, threshold: float) -> float:
        """Share of all FFNs of these tokens that are skipped."""
        return self._maxima.at_least(threshold) / (self.num_layers * self.tokens)

    def threshold(self, target: float) -> float:
        """The highest threshold whose skip ratio reaches `target`.

        Raises TargetOutOfReach when even skipping after every first FFN does not reach it.
        """
        check_reachable(self.policy, target, self.num_layers)
        skips = math.ceil((target - _ROUNDING) * self.num_layers * self.tokens)
        return self._maxima.largest(min(max(skips, 1), len(self._maxima)))


class LastCosinePrediction:
    """The same of a policy with tolerances, whose ratio is that of no multiset: the rule itself is walked.

    The ratio is only nearly monotone in the threshold, for a skip keeps a cosine from being seen.
    """

    def __init__(
        self, blocks: Callable[[], Iterable[np.ndarray]], policy: SkipPolicy, num_layers: int
    ) -> None:
        """Nothing is read yet; the rest is Prediction's."""
        self.policy, self.num_layers = policy, num_layers
        self._blocks = blocks
        self._ratios: dict[float, float] = {}

    def skip_ratio(self, threshold: float) -> float:
        """Share of all FFNs that are skipped: one pass over the trace, if the threshold is new."""
        if threshold not in self._ratios:
            policy, skipped, tokens = replace(self.policy, threshold=threshold), 0, 0
            for block in self._blocks():
                tokens += block.shape[1]
                skipped += _walked(block, policy)
            self._ratios[threshold] = skipped / (self.num_layers * tokens)
        return self._ratios[threshold]

    def threshold(self, target: float) -> float:
        """A threshold whose skip ratio reaches `target`, and that a little above it would not."""
        check_reachable(self.policy, target, self.num_layers)
        low, high = math.log(_LEAST_ANGLE), math.log(2.0)  # of 1 - threshold: all saturate at -1
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if self.skip_ratio(1 - math.exp(middle)) < target - _SLACK:
                low = middle
            else:
                high = middle
        return max(1 - math.exp(high), -1.0)


def _walked(cosine: np.ndarray, policy: SkipPolicy) -> int:
    """FFNs that tokens skip on a clean trace. cosine: [layers of `arming_layers`, tokens]."""
    assert policy.tolerances is not None
    last = np.full(cosine.shape[1], -np.inf, np.float32)
    row, total = np.zeros(cosine.shape[1], np.int32), 0
    most = policy.cold_e if policy.max_skips is None else policy.max_skips
    for layer in range(policy.cold_s, policy.cold_e):
        reach = np.float32(1 - (1 - policy.threshold) * policy.tolerances[layer])
        skip = (last >= reach) & (row < most)
        total += int(skip.sum())
        row = np.where(skip, row + 1, 0)
        if layer - policy.cold_s < len(cosine):  # the last FFN arms nothing
            last = np.where(skip, last, cosine[layer - policy.cold_s])
    return total


def arming_layers(policy: SkipPolicy) -> slice:
    """The layers whose cosines decide: the last FFN of the region arms nothing that is skipped."""
    return slice(policy.cold_s, max(policy.cold_e - 1, policy.cold_s))


def predicted_threshold(cosine: np.ndarray, policy: SkipPolicy, target: float) -> float:
    """`Prediction.threshold` of cosines [tokens, layers] past the warm-up, all in memory."""
    return in_memory(cosine, policy).threshold(target)


def in_memory(cosine: np.ndarray, policy: SkipPolicy) -> Prediction:
    """A prediction from cosines [tokens, layers] past the warm-up."""
    return Prediction(lambda: [cosine[:, arming_layers(policy)].T], policy, cosine.shape[1])


def check_reachable(policy: SkipPolicy, target: float, num_layers: int) -> None:
    """Raise TargetOutOfReach if no threshold skips `target` of all FFNs."""
    largest = policy.most_skips() / num_layers
    if target > largest + _SLACK:
        allowed = math.floor(1000 * largest) / 1000
        bound = "" if policy.max_skips is None else f" and max_skips {policy.max_skips}"
        raise TargetOutOfReach(
            f"target skip ratio {target:g} is out of reach: the region [{policy.cold_s}, {policy.cold_e})"
            f"{bound} of {num_layers} layers allows {allowed:.3f} at most; lower --target-skip-ratio, "
            "or widen the region with --cold-s and --cold-e"
        )


def target_ratios(policy: SkipPolicy, num_layers: int) -> list[float]:
    """0.05, 0.10, ... up to the largest reachable ratio; that one alone if it is smaller."""
    largest = policy.most_skips() / num_layers
    steps = [round(n * TARGET_STEP, 10) for n in range(1, int(largest / TARGET_STEP + _SLACK) + 1)]
    return steps or ([largest] if largest else [])


def cosine_curve(
    prediction: Prediction | LastCosinePrediction, measure: Callable[[SkipPolicy], float]
) -> RealisedCurve:
    """Realised ratios of the rule `cosine`, from what a clean trace predicts.

    The largest ratio is realised as predicted: every token is armed by the region's first FFN.
    """
    policy = prediction.policy
    return RealisedCurve(
        largest=policy.most_skips() / prediction.num_layers,
        threshold_at=prediction.threshold,
        predicted_at=prediction.skip_ratio,
        measure=lambda threshold: measure(replace(policy, threshold=threshold)),
    )
