"""A decode step of generate() that is prepared once and run for every token: what all kinds of it share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from skipcal.arch.locate import Architecture
from skipcal.core.host import PassTokens
from skipcal.runtime.engines.step_cache import Memories, StepCache
from skipcal.runtime.engines.step_proof import Deviation


class PreparedStep:
    """One decode step of `batch` rows of at most `room` tokens, over its own `cache`.

    fresh: a new text has begun. proofs, misses: how often its deviations from the model's own pass were
    noise, and how often more.
    """

    how: str  # in words, how it runs; known once it is made

    def __init__(
        self,
        forward: Callable[..., Any],
        architecture: Architecture,
        memories: Memories,
        *,
        batch: int,
        room: int,
        slots: int,
    ) -> None:
        """forward: the causal language model's. memories, slots: as of StepCache."""
        self.batch, self.room = batch, room
        self.cache = StepCache(memories, slots)
        self.dtype = next(architecture.stack.parameters()).dtype
        self.proofs = self.misses = 0
        self.fresh = True
        self._forward = forward
        takes_it = "logits_to_keep" in inspect.signature(forward).parameters
        self._options = {"logits_to_keep": 1} if takes_it else {}
        stack: Any = architecture.stack
        self._config = stack.config

    def start(self, tokens: int) -> StepCache:
        """An empty cache, for a new text of at most so many tokens."""
        self.cache.begin(tokens)
        self.fresh = True
        return self.cache

    def settle(self, given: dict[str, Any]) -> None:
        """Take from `given`, the arguments of the model's forward, what the next step needs to know."""
        raise NotImplementedError

    @property
    def is_made(self) -> bool:
        """Whether the next step can be run as it is."""
        raise NotImplementedError

    def make(self, given: dict[str, Any]) -> None:
        """Compile, capture or record what is missing for the step over `given`. Raises what goes wrong."""
        raise NotImplementedError

    def deviations(self, given: dict[str, Any]) -> list[Deviation]:
        """How far the step over `given`, skipping nothing, is from the model's; the cache is put back."""
        raise NotImplementedError

    def run_no_sync(self, ids: Tensor, positions: Tensor | None, tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of the next token; the next step may overwrite them.

        ids: [batch, 1]; positions: [batch, 1] or [1, 1]; None: those of rows without padding.
        """
        raise NotImplementedError

    def _model_logits(self, given: dict[str, Any]) -> Tensor:
        """Logits [batch, vocabulary] of the model's own pass over `given`; the cache is put back."""
        logits: Tensor = self._forward(**given).logits[:, -1]
        self.cache.rewind(1)
        return logits

    def _logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
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
