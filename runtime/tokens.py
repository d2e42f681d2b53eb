"""Which tokens of a forward pass are decode steps, and how many there were."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.core.policy import Policy
from skipcal.errors import SessionError
from skipcal.runtime.generate_call import TokenClock


class LazyCount:
    """A sum of numbers, some of them on a device, which is read only when somebody asks."""

    def __init__(self) -> None:
        """Start at 0."""
        self._known = 0
        self._there: Tensor | None = None  # 0-d int64

    def add_no_sync(self, count: int | Tensor) -> None:
        """Add a number, or a 0-d tensor."""
        if isinstance(count, int):
            self._known += count
        else:
            self._there = count if self._there is None else self._there + count.to(self._there.device)

    def __int__(self) -> int:
        """The sum so far."""
        return self._known + (0 if self._there is None else int(self._there))


class DecodeTokens:
    """Tells for each forward pass which of its tokens are decode steps past the warm-up, and counts them.

    steps, ruled_steps: tokens decoded so far, and those of them to which the policy applied.
    clock: that of the generate() call in progress, if there is one.
    longest: row in tokens that teacher forcing may be given; None: any.
    """

    def __init__(self, policy: Policy, *, teacher_forced: bool, prompt_tokens: list[int]) -> None:
        """Nothing has run. prompt_tokens: for teacher forcing, as `skipping` takes them."""
        self.teacher_forced = teacher_forced
        self.clock: TokenClock | None = None
        self.longest: int | None = None
        self.steps, self.ruled_steps = LazyCount(), LazyCount()
        self._policy = policy
        self._prompt_tokens = prompt_tokens
        # Of loops written by hand, of which there may be several at a time: by cache, and of new caches.
        self._prefill_ends: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        self._new_ends: dict[int, None] = {}  # the latest stands last

    def of_pass(self, given: dict[str, Any]) -> PassTokens:
        """The tokens of the pass over `given`, the arguments of the stack's forward by name."""
        ids = given.get("input_ids")
        tokens = given["inputs_embeds"] if ids is None else ids
        ids = None if ids is None else ids.reshape(-1)
        batch, length = tokens.shape[:2]
        if self.teacher_forced:
            steps = self._known_text_steps(given, batch, length, tokens.device)
            active = steps >= self._policy.warm_up_tokens
            self.steps.add_no_sync(int((steps >= 0).sum()))
            self.ruled_steps.add_no_sync(int(active.sum()))
            ruled = PassTokens(active=active, step=steps, ids=ids)
            return ruled if bool(active.any()) else FULL_PASS
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if self.clock is None:
            step = self._step_of_loop(cache, past, length)
        else:
            step = self._step_of_generate(self.clock, past, batch, length)
        return FULL_PASS if step is None else self.of_step(step, batch, tokens.device, ids)

    def of_step(self, step: int, batch: int, device: torch.device, ids: Tensor | None) -> PassTokens:
        """One token of each row, which are all at decode step `step`. ids: [batch]."""
        live = None
        if self.clock is not None:
            self.clock.begin_pass()
            live = self.clock.live(batch)
        decoded = batch if live is None else live.sum()
        self.steps.add_no_sync(decoded)
        if step < self._policy.warm_up_tokens:
            return PassTokens(counted=live, step=step, ids=ids)
        self.ruled_steps.add_no_sync(decoded)
        active = torch.ones(batch, dtype=torch.bool, device=device)
        return PassTokens(active=active, counted=live, step=step, ids=ids)

    def refuse_foreign_cache(self, past: int) -> None:
        """Raise SessionError where a cache that holds `past` tokens does not fit what is skipped."""
        if past and self._policy.unit == "layer":
            raise SessionError(
                f"{self._policy.method} leaves layers out, so it cannot go on from a cache that holds {past} "
                "tokens; begin with the whole text and an empty cache"
            )

    def _step_of_generate(self, clock: TokenClock, past: int, batch: int, length: int) -> int | None:
        """Index of the decode step that a pass of generate() is, None for a prefill."""
        if clock.emitted and length == 1:
            return clock.emitted - 1
        clock.begin_pass()
        if clock.emitted == 0:
            return None
        # Some models drop their cache where a text outgrows what they were first trained on, and prefill all
        # of it again. That takes the place of one decode step, to which the policy does not apply.
        if past == 0 and clock.begin_again():
            live = clock.live(batch)
            self.steps.add_no_sync(batch if live is None else live.sum())
            return None
        raise SessionError(
            f"generate() decoded {length} tokens in one pass; skipping needs a cache and one "
            "token a pass (use_cache=True, no assisted decoding)"
        )

    def _step_of_loop(self, cache: Any, past: int, length: int) -> int | None:
        """Index of the decode step that a pass of a loop written by hand is, None for a prefill."""
        if past == 0 or length > 1:
            self.refuse_foreign_cache(past)
            end = past + length
            if cache is not None:
                self._prefill_ends[cache] = end
            self._new_ends.pop(end, None)
            self._new_ends[end] = None
            return None
        known = self._prefill_ends.get(cache)
        if (
            known is None
        ):  # the prefill made it; or it is a copy of one; or the prefill ran before the session began
            known = past if past in self._new_ends else next(reversed(self._new_ends), None)
        if known is None or past < known:
            self.refuse_foreign_cache(past)
            known = past
        self._prefill_ends[cache] = known
        return past - known

    def _known_text_steps(
        self, given: dict[str, Any], batch: int, length: int, device: torch.device
    ) -> Tensor:
        """Decode step of each position of a teacher-forced pass, [batch * seq]; negative: prefill or pad."""
        cache, mask = given.get("past_key_values"), given.get("attention_mask")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise SessionError(
                "teacher forcing needs a 2-D attention mask, [batch, seq]: positions are counted by it"
            )
        if mask is None:
            positions = torch.arange(past, past + length, device=device).expand(batch, -1)
            real = None
        else:
            positions = (mask.long().cumsum(-1) - 1)[:, -length:]
            real = mask[:, -length:].bool()
        asked = given.get("position_ids")
        if asked is not None:
            different = asked.expand_as(positions) != positions
            if bool((different if real is None else different & real).any()):
                raise SessionError(
                    "position_ids restart or jump within a row; teacher forcing takes a row for one "
                    "text, so pass packed sequences as rows of their own"
                )
        if len(self._prompt_tokens) not in (1, batch):
            raise SessionError(
                f"prompt_tokens names {len(self._prompt_tokens)} rows, the pass has {batch}; open a session "
                "for each batch"
            )
        if self.longest is not None:
            self._refuse_longer(
                int((positions if real is None else positions * real).max()) + 1, self.longest
            )
        steps = positions - torch.tensor(self._prompt_tokens, device=device)[:, None]
        return (steps if real is None else steps.masked_fill(~real, -1)).reshape(-1)

    def _refuse_longer(self, tokens: int, longest: int) -> None:
        if tokens > longest:
            raise SessionError(
                f"a row of {tokens} tokens is decoded with other rotary angles than one pass gives it, for "
                f"the model changes them past {longest}; give rows of {longest} at most, or use generate()"
            )
