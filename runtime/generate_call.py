"""One call of `generate()` inside a session: what is refused, and which rows are over."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor
from transformers import StoppingCriteriaList

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


class TokenClock:
    """Counts the tokens that one generate() call has chosen, and knows which rows are over.

    Passes and tokens take turns; only a prompt may be given in several passes. emitted: tokens chosen for
    each row so far.
    """

    def __init__(self) -> None:
        """Start before the first token."""
        self.emitted = 0
        self._over: Tensor | None = None  # [rows] bool
        self._passed = False  # there was a pass for the next token
        self._last_prefill = 0  # value of `emitted` then

    def begin_pass(self) -> None:
        """A pass for the next token begins. Raises SessionError where there was one already."""
        # Rows that are over are passed on with, where other processes are not done yet.
        if self._passed and self.emitted and not self._all_over():
            raise SessionError(
                "the model was called twice for one token of generate(), where every call counts as a decode "
                "step; leave it alone in logits processors, stopping criteria, streamers and hooks"
            )
        self._passed = True

    def begin_again(self) -> bool:
        """Whether the text may be prefilled anew for the next token: not for every token."""
        every_time = 0 < self._last_prefill == self.emitted - 1
        self._last_prefill = self.emitted
        return not every_time

    def tick(self, over: Tensor) -> None:
        """One more token was chosen for every row; rows in `over` have had their last."""
        if not self._passed:
            raise SessionError(
                "generate() has chosen a token by a pass that skipping(...) did not see: the block was left, "
                "or its hooks were taken off the model; keep both until the call has returned"
            )
        self._passed = False
        self.emitted += 1
        self._over = over if self._over is None else self._over | over

    def live(self, rows: int) -> Tensor | None:
        """Mask [rows] of those that are still decoded; None: all are.

        Beam search asks its criteria about candidates, not rows; its beams all live to the end.
        """
        return ~self._over if self._over is not None and len(self._over) == rows else None

    def _all_over(self) -> bool:
        return self._over is not None and bool(self._over.all())


class ClockedCriteria(StoppingCriteriaList):
    """All stopping criteria of a generate() call, which asks them after every token."""

    clock: TokenClock

    @classmethod
    def around(cls, criteria: StoppingCriteriaList, clock: TokenClock) -> ClockedCriteria:
        """The same criteria; `clock` hears their answers."""
        clocked = cls(criteria)
        clocked.clock = clock
        return clocked

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """What the criteria say, [rows] bool."""
        over = super().__call__(input_ids, scores, **kwargs)
        self.clock.tick(over.bool())
        return over


def prepare_options(options: dict[str, Any], default: Any) -> dict[str, Any]:
    """The arguments to call generate() with inside a session.

    default: the model's generation configuration, which generate() takes for what is left out.
    Raises SessionError for what would decode in another order than the rule's.
    """
    given = options.get("generation_config")

    def get(name: str) -> Any:
        values = (options.get(name), getattr(given, name, None), getattr(default, name, None))
        return next((value for value in values if value is not None), None)

    for name, reason in _REFUSED_OPTIONS.items():
        if get(name) is not None:
            raise SessionError(f"generate({name}=...) cannot be used inside skipping(...): {reason}")
    if get("use_cache") is False:
        raise SessionError(
            "generate(use_cache=False) decodes every position again at each step; leave the cache on"
        )
    if get("guidance_scale") not in (None, 1):
        raise SessionError("generate(guidance_scale=...) runs the model twice a token; leave it out")
    if get("cache_implementation") == "paged":
        refuse_continuous_batching()
    # With a static cache on a GPU generate() would compile the forward, past what is set on modules.
    if given is None:
        return {**options, "disable_compile": True}
    config = copy.deepcopy(given)
    config.disable_compile = True
    return {**options, "generation_config": config}


def signature_of(owner: Any, name: str) -> inspect.Signature:
    """That of `owner.name`; where it takes `*args` and tells no names, of the method that it stands for."""
    own = [vars(kind)[name].__get__(owner) for kind in type(owner).__mro__ if name in vars(kind)]
    found = [inspect.signature(method) for method in (getattr(owner, name), *own)]
    return next((each for each in found if not _nameless(each)), found[0])


def _nameless(signature: inspect.Signature) -> bool:
    return any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values())


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
