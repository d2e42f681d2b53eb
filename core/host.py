"""What a host tells: whoever runs a model says this much of it, and nothing else is asked.

A host is transformers (`skipcal.runtime`), or a serving engine. It knows where the FFN blocks are; for each
of them it hands a rule the residual stream before the FFN and the FFN's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

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


class PlacedBlock(Protocol):
    """The FFN block of one layer: which, and where and in which precision the layer computes."""

    @property
    def index(self) -> int:
        """Of the layer, 0-based."""

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Device and precision."""


class BlockWeights(PlacedBlock, Protocol):
    """The same block, with what a skip of it saves.

    weight_bytes: bytes of weights that a token does not read when the FFN is skipped; layer_bytes: the
    same for the whole layer, attention included.
    """

    @property
    def weight_bytes(self) -> int:
        """Of the FFN."""

    @property
    def layer_bytes(self) -> int:
        """Of the layer."""
