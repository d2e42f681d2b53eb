"""What a session asks of an engine."""

from __future__ import annotations

from typing import Protocol

from skipcal.core.host import PassTokens
from skipcal.errors import SessionError


class Engine(Protocol):
    """Runs the forward passes of a session, and counts what it skipped."""

    @property
    def name(self) -> str:
        """As `skipping(engine=...)` names it."""

    @property
    def reason(self) -> str:
        """Why this engine, for the report."""

    @property
    def skipped_per_layer(self) -> list[int]:
        """Skipped blocks of live rows, L entries."""

    @property
    def weight_bytes_saved(self) -> int:
        """Bytes of weights that were not read; see SkipReport."""

    @property
    def row_decisions(self) -> tuple[int, int]:
        """Decisions on which all live rows agreed, and decisions; (0, 0) where it is not measured."""

    @property
    def prepared_passes(self) -> int:
        """Decode passes that a prepared step ran."""

    @property
    def setup_s(self) -> float:
        """Seconds in which steps were prepared."""

    def attach(self) -> None:
        """Set on the model what skipping needs."""

    def detach(self) -> None:
        """Put back what `attach` found. A second call does nothing."""

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass."""

    def end(self) -> None:
        """The pass is over. Raises SessionError where a part of the model did not ask whether to skip.

        What is called before the next one is announced is the model's own.
        """


def bypassed(layer: int) -> SessionError:
    """The error for a layer whose modules were called past what stands on them."""
    return SessionError(
        f"layer {layer} was not asked whether to skip: somebody else has replaced the forward of its modules "
        "inside skipping(...); do that before the session, or have the replacement call the forward it found"
    )
