"""What a policy loses on text that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from skipcal.arch.locate import input_device
from skipcal.core.policy import Policy
from skipcal.fit.prepared import Prepared
from skipcal.runtime.session import skipping
from skipcal.text.batching import batches


class HeldOutLoss:
    """Excess loss by corpus, nats per token past the warm-up, teacher-forced.

    Of each window the tokens are scored that a decode step past the warm-up predicts.
    """

    def __init__(self, prepared: Prepared, windows: int | None = None) -> None:
        """Measure the full model on the first `windows` of each corpus; None: on all."""
        self._prepared = prepared
        self._rows = {s.corpus.name: s.held_out[:windows] for s in prepared.samples}
        self._full = {name: self._loss(rows) for name, rows in self._rows.items()}

    def __call__(self, policy: Policy) -> dict[str, float]:
        """The excess of `policy` on each corpus, of as many windows each."""
        prepared = self._prepared
        with skipping(
            prepared.loaded.model,
            policy=policy,
            teacher_forced=True,
            prompt_tokens=prepared.given,
            architecture=prepared.architecture,
        ):
            return {name: self._loss(rows) - self._full[name] for name, rows in self._rows.items()}

    @torch.no_grad()
    def _loss(self, rows: Sequence[Sequence[int]]) -> float:
        model: Any = self._prepared.loaded.model
        device, first = input_device(model), self._prepared.first
        total, count = 0.0, 0
        for batch in batches(rows, self._prepared.config.batch_size):
            ids = torch.tensor(batch, device=device)
            logits = model(input_ids=ids, use_cache=False).logits[:, first:-1].float().flatten(0, 1)
            targets = ids[:, first + 1 :].flatten().to(logits.device)
            total += float(nn.functional.cross_entropy(logits, targets, reduction="sum"))
            count += len(targets)
        return total / count
