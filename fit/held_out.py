"""What a policy loses on text that nothing was fitted on."""

from __future__ import annotations

from collections.abc import Sequence

from skipcal.calibrate.passes import mean_loss
from skipcal.core.policy import Policy
from skipcal.fit.prepared import Prepared
from skipcal.runtime.session import skipping


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

    def _loss(self, rows: Sequence[Sequence[int]]) -> float:
        prepared = self._prepared
        model, batch_size = prepared.loaded.model, prepared.config.batch_size
        return mean_loss(model, rows, prepared.first, batch_size=batch_size)
