"""What the full model predicts over windows of text, kept for all policies that are compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

# It is taken from the device that holds the model. The default windows of the perplexity task, 16 of 512
# tokens, are 1.6 GB for the embedded model's 49,152 words in float32, 0.5 GB for the 32,000 of Llama 2 in
# half precision and 2.5 GB for the 152,000 of Qwen2.5.
KEPT_BYTES = 4 << 30


class FullPasses:
    """Logits of the full model by batch.

    A batch is the same one only with the same rows in the same order: other rows beside it change the last
    digits of a row. Kept are logits in the model's own precision, half of what log-probabilities take where
    that has 16 bits; a softmax is little beside a pass. What lies beyond KEPT_BYTES is computed anew.
    """

    def __init__(self) -> None:
        """Nothing is kept before `kept` is entered."""
        self._kept: dict[object, Tensor] | None = None
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
        logits = None if self._kept is None else self._kept.get(batch)
        if logits is None:
            logits = model(input_ids=rows, use_cache=False).logits[:, first:-1].clone()
            if self._kept is not None and self._bytes + logits.nbytes <= KEPT_BYTES:
                self._kept[batch] = logits
                self._bytes += logits.nbytes
        return [row.float().log_softmax(-1) for row in logits]
