"""What the full model predicts over windows of text, kept for all policies that are compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# It is taken from the device that holds the model. The default windows of the perplexity task, 16 of 512
# tokens, are 1.6 GB for the embedded model's 49,152 words and 1.0 GB for the 32,000 of Llama 2.
KEPT_BYTES = 2 << 30


class FullPasses:
    """Log-probabilities of the full model by batch.

    A batch is the same one only with the same rows in the same order: other rows beside it change the last
    digits of a row. Kept are log-probabilities and not logits, so that the softmax over the vocabulary is
    not computed again for each policy either. What lies beyond KEPT_BYTES is computed anew each time.
    """

    def __init__(self) -> None:
        """Nothing is kept before `kept` is entered."""
        self._kept: dict[object, list[Tensor]] | None = None
        self._bytes = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep passes until the end: for as long as the model stays as it is."""
        self._kept, self._bytes = {}, 0
        try:
            yield
        finally:
            self._kept = None

    @torch.no_grad()
    def log_probabilities(self, model: Any, rows: Tensor, first: int) -> list[Tensor]:
        """For each row of ids [batch, seq] what the positions from `first` predict, but for the last one's.

        Each [seq - first - 1, vocabulary], float32.
        """
        batch = (first, tuple(map(tuple, rows.tolist())))
        if self._kept is not None and batch in self._kept:
            return self._kept[batch]
        logits = model(input_ids=rows, use_cache=False).logits
        found = [row[first:-1].float().log_softmax(-1) for row in logits]
        size = sum(row.nbytes for row in found)
        if self._kept is not None and self._bytes + size <= KEPT_BYTES:
            self._kept[batch] = found
            self._bytes += size
        return found
