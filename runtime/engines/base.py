"""What a session asks of an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from skipcal.errors import SessionError

Watcher = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class PassTokens:
    """The tokens of one forward pass, flattened over batch and position: [tokens].

    active:  [tokens] bool, those to which the policy applies. None: the full model runs, the pass
             is a prefill or lies within the warm-up.
    counted: [tokens] bool, those of the active ones that the report counts; None: all of them.
    step:    decode step; one number for a decode step, [tokens] for a teacher-forced pass.
    ids:     [tokens] input ids; None where the model was given embeddings.
    on_device: the pass is captured once and repeated: `active` and `step` are tensors that change,
             and no Python value may be made of what is on the device, for a single token either.
    watcher: told of each layer that is left out for some tokens, and for which: (layer, [tokens] bool).
    """

    active: Tensor | None = None
    counted: Tensor | None = None
    step: Tensor | int = -1
    ids: Tensor | None = None
    on_device: bool = False
    watcher: Watcher | None = None

    def tell(self, layer: int, skip: Tensor | bool) -> None:
        """Tell the watcher, if there is one, which tokens skip `layer`: [tokens], or the only one."""
        if self.watcher is not None:
            self.watcher(layer, torch.as_tensor(skip).reshape(-1))


FULL_PASS = PassTokens()


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
