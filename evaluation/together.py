"""What requests that run together leave unread: an FFN's weights are, only where all of them skip it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from skipcal.core.host import BlockWeights
from skipcal.core.surrogates import Surrogates


class SkipsByPosition:
    """How many windows skip each FFN at each position: `see` is a watcher of teacher-forced passes.

    width: tokens of a window; first: its first position past the warm-up, where counting begins.
    """

    def __init__(self, num_layers: int, *, width: int, first: int) -> None:
        """No window was seen."""
        self._width, self._first = width, first
        self.skips = np.zeros((num_layers, width - first), dtype=np.int64)  # [layers, positions]

    def see(self, layer: int, skip: Tensor) -> None:
        """Count the windows of a pass; skip: [windows * width] bool."""
        windows = skip.reshape(-1, self._width)[:, self._first :]
        self.skips[layer] += windows.sum(0, dtype=torch.int64).cpu().numpy()


def unread_bytes(
    skips: np.ndarray, windows: int, requests: int, blocks: Sequence[BlockWeights], surrogates: Surrogates
) -> float:
    """Bytes of weights that a step of `requests` rows leaves unread, less the surrogates' that it reads.

    skips: [layers, positions], windows that skip. The mean over positions and over all choices of `requests`
    of the `windows`, which is exact: of k windows that skip, a choice holds j by the hypergeometric
    distribution. The rows begin together, as in a batch; of several maps of a surrogate each may be another.
    """
    chances = _chances(windows, requests)  # [windows + 1, requests + 1]
    total = 0.0
    for block, counts in zip(blocks, skips, strict=True):
        together = chances[counts].mean(0)  # chance of j rows that skip, over positions
        read = [surrogates.bytes_at(block, rows) for rows in range(requests + 1)]
        total += float(block.weight_bytes * together[-1] - together @ np.asarray(read, dtype=float))
    return total


def _chances(windows: int, requests: int) -> np.ndarray:
    """[k, j]: the chance that j of `requests` windows skip where k of all do."""
    ways = math.comb(windows, requests)
    return np.array(
        [
            [math.comb(k, j) * math.comb(windows - k, requests - j) / ways for j in range(requests + 1)]
            for k in range(windows + 1)
        ]
    )
