"""Find thresholds by the skip ratio they *realise*, measuring as seldom as possible.

Skipping perturbs the stream, so a threshold realises another ratio than scores of an earlier pass
predict, and another on every kind of text. The drift is smooth: as a function of the predicted ratio, the
realised one runs from (0, 0) to (largest, largest). Every measurement adds a point to that curve, for this
target and for the next ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

CLOSED_LOOP_TOLERANCE = 0.005  # of the realised skip ratio
CLOSED_LOOP_PASSES = 6  # per target, at most, of a smooth curve; two or three are usual
BENT_PASSES = 8  # of one that may bend


def middle_first(targets: Sequence[float]) -> list[float]:
    """The targets, ascending when given, in an order in which each lies half-way between two before it.

    So the curve is never looked for where nothing is known of it for far around.
    """
    ordered, spans = [], [list(targets)]
    for span in spans:
        if span:
            half = len(span) // 2
            ordered.append(span[half])
            spans += [span[:half], span[half + 1 :]]
    return ordered


@dataclass
class RealisedCurve:
    """Realised ratio against predicted ratio, as far as it is known.

    largest:      the largest ratio there is, predicted and realised.
    threshold_at: the threshold for a predicted ratio, predicted_at: the way back.
    measure:      the ratio that a threshold realises.
    bends:        the curve may bend sharply, as it does on other text than the predictions are of.
    """

    largest: float
    threshold_at: Callable[[float], float]
    predicted_at: Callable[[float], float]
    measure: Callable[[float], float]
    bends: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)  # predicted, realised

    def __post_init__(self) -> None:
        """Both ends are known."""
        self.points += [(0.0, 0.0), (self.largest, self.largest)]

    def threshold(self, target: float) -> tuple[float, float]:
        """The threshold whose realised skip ratio comes closest to `target`, and that ratio."""
        target = min(target, self.largest)
        tried: list[tuple[float, float]] = []
        run = 0  # measurements in a row that realised too much; below zero: too little
        for _ in range(BENT_PASSES if self.bends else CLOSED_LOOP_PASSES):
            threshold = self.threshold_at(self._predicted_for(target, run))
            if threshold in dict(tried):
                break  # there is no value in between
            realised = self.measure(threshold)
            self.points.append((self.predicted_at(threshold), realised))
            tried.append((threshold, realised))
            if abs(realised - target) <= CLOSED_LOOP_TOLERANCE:
                break
            run = max(run, 0) + 1 if realised > target else min(run, 0) - 1
        return min(tried, key=lambda pair: abs(pair[1] - target))

    def _predicted_for(self, target: float, run: int) -> float:
        """The predicted ratio at which the points known so far put `target`: false position.

        It creeps towards one end of a bent curve. There, from the second measurement in a `run` on one
        side of the target, the other side's miss is halved: the Illinois algorithm (Dowell, Jarratt 1971).
        """
        below = max(point for point in self.points if point[1] <= target)
        above = min(point for point in self.points if point[1] >= target)
        if above[1] <= below[1] or above[0] <= below[0]:
            return (below[0] + above[0]) / 2
        lacking, span = target - below[1], above[1] - below[1]
        if self.bends and abs(run) > 1:
            lacking *= 0.5 ** max(run - 1, 0)
            span = lacking + (above[1] - target) * 0.5 ** max(-run - 1, 0)
        return below[0] + (above[0] - below[0]) * lacking / span
