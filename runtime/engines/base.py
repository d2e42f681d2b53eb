"""What a session asks of an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class PassTokens:
    """The tokens of one forward pass, flattened over batch and position: [tokens].

    active:  [tokens] bool, those to which the policy applies. None: the full model runs, the pass
             is a prefill or lies within the warm-up.
    counted: [tokens] bool, those of the active ones that the report counts; None: all of them.
    step:    decode step; one number for a decode step, [tokens] for a teacher-forced pass.
    ids:     [tokens] input ids; None where the model was given embeddings.
    """

    active: Tensor | None = None
    counted: Tensor | None = None
    step: Tensor | int = -1
    ids: Tensor | None = None


FULL_PASS = PassTokens()


class Engine(Protocol):
    """Runs the forward passes of a session, and counts what it skipped."""

    name: str
    reason: str  # why this engine, for the report
    skipped_per_layer: list[int]
    weight_bytes_saved: int

    def attach(self) -> None:
        """Set on the model what skipping needs."""

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass."""
