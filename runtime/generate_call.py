"""One call of `generate()` inside a session: its options, what is refused, when a row is over."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from skipcal.errors import SessionError

# generate() options under which rows are not what the rule takes them for.
_REFUSED_OPTIONS = {
    "assistant_model": "assisted decoding drafts with another model and rolls the cache back",
    "prompt_lookup_num_tokens": "prompt lookup rolls the cache back",
    "assistant_early_exit": "early-exit drafting rolls the cache back",
    "custom_generate": "a custom decoding loop may call the model in any order",
    "compile_config": "a compiled forward ignores what is set on the modules",
}
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching")


class TokenClock(StoppingCriteria):
    """Counts the tokens that generate() has chosen, and knows which rows are over.

    It stands among the stopping criteria, which generate() asks after every token, and never stops
    a row itself. `emitted` is the number of tokens chosen for each row so far.
    """

    def __init__(self, end_ids: Tensor | None) -> None:
        """Start before the first token; `end_ids` are the end-of-sequence ids, if any."""
        self.emitted = 0
        self._end_ids = end_ids
        self._over: Tensor | None = None  # [rows] bool

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Called once for every token chosen; the answer is False for each of [rows]."""
        self.emitted += 1
        if self._end_ids is not None:
            self.note(torch.isin(input_ids[:, -1], self._end_ids.to(input_ids.device)))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    def note(self, over: Tensor) -> None:
        """Rows in `over` have had their last token."""
        self._over = over if self._over is None else self._over | over

    def live(self, rows: int) -> Tensor | None:
        """Mask [rows] of those that are still decoded; None: all are.

        Beam search asks its criteria about candidates, not rows; its beams all live to the end.
        """
        return ~self._over if self._over is not None and len(self._over) == rows else None


class _Noted(StoppingCriteria):
    """A criterion of the caller's, whose answers the clock hears too."""

    def __init__(self, inner: Any, clock: TokenClock) -> None:
        self._inner = inner
        self._clock = clock

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        over = self._inner(input_ids, scores, **kwargs)
        if isinstance(over, Tensor):
            self._clock.note(over.to(input_ids.device).bool())
        return over


class GenerateOptions:
    """Options of one generate() call over its generation configuration."""

    def __init__(self, options: dict[str, Any], default: Any) -> None:
        """Take the call's arguments, and the model's own configuration for what they leave out."""
        self._options = options
        self._config = options.get("generation_config") or default

    def get(self, name: str) -> Any:
        """The value in force; like in generate(), None in the call means: as configured."""
        value = self._options.get(name)
        return getattr(self._config, name, None) if value is None else value

    def refuse_unfit(self) -> None:
        """Raise SessionError for what would decode in another order than the rule's."""
        for name, reason in _REFUSED_OPTIONS.items():
            if self.get(name) is not None:
                raise SessionError(f"generate({name}=...) cannot be used inside skipping(...): {reason}")
        if self.get("use_cache") is False:
            raise SessionError(
                "generate(use_cache=False) decodes every position again at each step; leave the cache on"
            )
        if self.get("cache_implementation") == "paged":
            refuse_continuous_batching()

    def criteria(self) -> tuple[StoppingCriteriaList, TokenClock]:
        """The caller's stopping criteria with a clock among them."""
        ends = self.get("eos_token_id")
        beams = (self.get("num_beams") or 1) > 1
        clock = TokenClock(None if ends is None or beams else torch.as_tensor(ends).flatten())
        given = list(self._options.get("stopping_criteria") or [])
        if beams:
            return StoppingCriteriaList([*given, clock]), clock
        # generate() looks for a length criterion by its class; it ends all rows at once anyway.
        noted = [c if isinstance(c, MaxLengthCriteria) else _Noted(c, clock) for c in given]
        tokenizer, strings = self._options.get("tokenizer"), self.get("stop_strings")
        if strings and tokenizer is not None:  # generate() makes its own, which the clock cannot hear
            noted.append(_Noted(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings), clock))
        return StoppingCriteriaList([*noted, clock]), clock


def call_arguments(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of a call by name, whichever way they were passed."""
    bound = signature.bind_partial(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return dict(bound)


def refuse_continuous_batching(*_args: Any, **_kwargs: Any) -> Any:
    """Stand in for the continuous batching methods of a model inside a session."""
    raise SessionError(
        "continuous batching packs many requests into one row, and the rule needs one token a row; "
        "use generate() inside skipping(...)"
    )
