"""Exact ranks among the running maxima of a trace, in memory that does not grow with the trace.

A float32 is a 32-bit key whose order is that of the numbers. One pass counts the upper halves of all
keys, 65,536 bins; which key has a rank is then known but for its lower half, and one more pass counts
the lower halves within that bin. No value is rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

_HALF = 1 << 16


class RunningMaxima:
    """m_j = max(cos_i, i <= j) of every token, over the layers of a region.

    blocks: called for each pass, gives cosines [layers, tokens] float32, the same each time.
    last:   count only the last so many m_j of a token; None: all.
    """

    def __init__(self, blocks: Callable[[], Iterable[np.ndarray]], last: int | None = None) -> None:
        """Make the first pass."""
        self._blocks, self._last = blocks, last
        self.tokens = 0
        self._upper = np.zeros(_HALF, np.int64)
        self._lower: dict[int, np.ndarray] = {}
        for block in blocks():
            self.tokens += block.shape[1]
            self._upper += np.bincount(self._keys(block) >> 16, minlength=_HALF)

    def __len__(self) -> int:
        """How many values there are."""
        return int(self._upper.sum())

    def largest(self, rank: int) -> float:
        """The value of that rank from above; 1 is the largest, len(self) the smallest."""
        upper, rank = _bin_of(self._upper, rank)
        lower, _ = _bin_of(self._lower_halves(upper), rank)
        return float(_values(np.array([upper << 16 | lower], np.uint32))[0])

    def at_least(self, threshold: float) -> int:
        """How many values are `threshold` or more, compared as float32."""
        key = int(_ordered(np.array([threshold], np.float32))[0])
        upper, lower = key >> 16, key & (_HALF - 1)
        return int(self._upper[upper + 1 :].sum() + self._lower_halves(upper)[lower:].sum())

    def _lower_halves(self, upper: int) -> np.ndarray:
        """Counts of the lower halves of the keys with that upper half."""
        if upper not in self._lower:
            counts = np.zeros(_HALF, np.int64)
            if self._upper[upper]:
                for block in self._blocks():
                    keys = self._keys(block)
                    inside = keys[keys >> 16 == upper] & (_HALF - 1)
                    counts += np.bincount(inside, minlength=_HALF)
            self._lower = {upper: counts}  # the next question is mostly of the same bin
        return self._lower[upper]

    def _keys(self, block: np.ndarray) -> np.ndarray:
        first = 0 if self._last is None else max(len(block) - self._last, 0)
        return _ordered(np.maximum.accumulate(block, axis=0)[first:].ravel())


def _bin_of(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Which bin holds the value of that rank from above, and its rank within the bin."""
    above = np.cumsum(counts[::-1])
    place = int(np.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


def _ordered(values: np.ndarray) -> np.ndarray:
    """uint32 keys in the order of float32 numbers: negative ones have their bits turned over."""
    bits = (values + np.float32(0)).view(np.uint32)  # + 0: -0 is 0
    return np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))


def _values(keys: np.ndarray) -> np.ndarray:
    return np.where(keys >> 31, keys & np.uint32((1 << 31) - 1), ~keys).astype(np.uint32).view(np.float32)
