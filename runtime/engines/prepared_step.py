"""A decode step of generate() that is prepared once and run for every token: what all kinds of it share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipcal.arch.locate import Architecture
from skipcal.runtime.engines.base import PassTokens
from skipcal.runtime.engines.step_cache import StepCache


class PreparedStep:
    """One decode step of `batch` rows of at most `room` tokens, over its own `cache`.

    fresh: a new text has begun. proofs: how often somebody has compared its logits with `model_logits`.
    inference: it was made in inference mode, whose tensors are of no use outside.
    """

    how: str  # in words, how it runs; known once it is prepared

    def __init__(
        self, forward: Callable[..., Any], architecture: Architecture, *, batch: int, room: int, slots: int
    ) -> None:
        """forward: the causal language model's. slots: of the cache at first; it grows by doubling."""
        self.batch, self.room = batch, room
        self.cache = StepCache(architecture.num_layers, slots)
        self.dtype = next(architecture.stack.parameters()).dtype
        self.inference = torch.is_inference_mode_enabled()
        self.proofs = 0
        self.fresh = True
        self._forward = forward
        takes_it = "logits_to_keep" in inspect.signature(forward).parameters
        self._options = {"logits_to_keep": 1} if takes_it else {}
        stack: Any = architecture.stack
        self._config = stack.config

    def start(self) -> StepCache:
        """An empty cache, for a new text."""
        self.cache.clear()
        self.fresh = True
        return self.cache

    def prepare(self, given: dict[str, Any]) -> None:
        """Make the step over `given`, the arguments of the model's forward, possible."""
        raise NotImplementedError

    def run_no_sync(self, ids: Tensor, positions: Tensor | None, tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of the next token; the next step may overwrite them.

        ids: [batch, 1]; positions: [batch, 1] or [1, 1]; None: those of rows without padding.
        """
        raise NotImplementedError

    def model_logits(self, given: dict[str, Any]) -> Tensor:
        """Logits [batch, vocabulary] of the model's own pass over `given`; the cache is put back."""
        logits: Tensor = self._forward(**given).logits[:, -1]
        self.cache.rewind(1)
        return logits

    def _make_room(self) -> None:
        """Have a place in the cache for one token more."""
        if self.cache.get_seq_length() >= self.cache.slots:
            self.cache.reserve(min(2 * self.cache.slots, self.room))

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """Logits [batch, vocabulary] of the model's forward over one token a row: what a step is made of."""
        output = self._forward(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **self._options,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
