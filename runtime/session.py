"""`skipping`: run an untouched transformers model with FFN blocks left out.

A session knows which of the tokens of a forward pass are decode steps past the warm-up; the
engine below it decides and skips. It stands around plain `generate()`, around a decoding loop of
your own, or (`teacher_forced=True`) around parallel forward passes over a known text.
"""

from __future__ import annotations

import functools
import inspect
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from skipcal.arch.locate import Architecture, locate, unwrap
from skipcal.errors import ConfigError, SessionError
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.engines.base import FULL_PASS, Engine, PassTokens
from skipcal.runtime.engines.choice import check_engine
from skipcal.runtime.generate_call import (
    CONTINUOUS_BATCHING,
    ClockedCriteria,
    TokenClock,
    call_arguments,
    prepare_options,
    refuse_continuous_batching,
)
from skipcal.runtime.patch import InstancePatches
from skipcal.runtime.policy import Policy
from skipcal.runtime.report import SkipReport

logger = logging.getLogger(__name__)

_sessions: weakref.WeakKeyDictionary[nn.Module, SkipSession] = weakref.WeakKeyDictionary()


def skipping(
    model: nn.Module,
    profile: SkipProfile | None = None,
    *,
    policy: Policy | None = None,
    target_skip_ratio: float | None = None,
    teacher_forced: bool = False,
    prompt_tokens: int | Sequence[int] = 1,
    engine: str = "auto",
    architecture: Architecture | None = None,
) -> SkipSession:
    """Return a context manager inside which `model` skips FFN blocks (or layers, by some baselines).

    profile:           whose recommended policy applies; `target_skip_ratio` picks another of its
                       operating points.
    policy:            instead of a profile: a SkipPolicy, or what `skipcal.baselines` makes.
    teacher_forced:    skip in parallel forward passes over whole sequences. Positions below
                       `prompt_tokens` (one number, or one for each row of the batches to come) are
                       the prefill; position p is decode step p - prompt_tokens. Decisions and
                       logits equal those of decoding the same text token by token.
    engine:            "auto" or "eager".
    architecture:      what `locate(model)` returned, to save proving the model again.

        with skipcal.skipping(model, profile) as run:
            model.generate(**inputs, max_new_tokens=128)
        print(run.report.skip_ratio)

    Raises ConfigError for options that do not fit together, ProfileMismatch for a profile of
    another model, SessionError where skipping would be ignored or wrong, UnsupportedModel when
    the FFN blocks cannot be located.
    """
    if (profile is None) == (policy is None):
        raise ConfigError("give skipping() either a profile or policy=SkipPolicy(...), not both or none")
    if policy is not None and target_skip_ratio is not None:
        raise ConfigError("target_skip_ratio chooses among a profile's operating points; pass a profile")
    if prompt_tokens != 1 and not teacher_forced:
        raise ConfigError("prompt_tokens has a meaning only with teacher_forced=True")
    prompts = [prompt_tokens] if isinstance(prompt_tokens, int) else list(prompt_tokens)
    if not prompts or min(prompts) < 1:
        raise ConfigError(f"prompt_tokens {prompt_tokens} is below 1: a first token cannot be predicted")
    check_engine(engine)
    if profile is not None:
        profile.check_fits(unwrap(model))
        policy = profile.policy_for(target_skip_ratio)
    assert policy is not None
    return SkipSession(model, policy, teacher_forced, prompts, engine, architecture)


class SkipSession:
    """One use of a model under a policy. Enter it once; read `report` inside or afterwards."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        teacher_forced: bool,
        prompt_tokens: list[int],
        engine: str,
        architecture: Architecture | None,
    ) -> None:
        """Use `skipping`, which checks the arguments."""
        self.policy = policy
        self._outer = model
        self._model = unwrap(model)
        self._teacher_forced = teacher_forced
        self._prompt_tokens = prompt_tokens
        self._requested_engine = engine
        self._architecture = architecture
        self._engine: Engine | None = None
        self._handles: list[Any] = []
        self._patches = InstancePatches()
        self._steps = 0
        self._ruled_steps = 0
        self._prefill_end: int | None = None
        self._clock: TokenClock | None = None

    def __enter__(self) -> Self:
        """Prepare the model; nothing is changed on it when this raises."""
        if self._engine is not None:
            raise SessionError("this session was entered before; call skipping(...) again for a new one")
        if self._model in _sessions:
            raise SessionError("the model is already inside a skipping(...) block; leave that one first")
        _refuse_unfit(self._outer, self._model)
        architecture = self._architecture or locate(self._model)
        self.policy.check_layers(architecture.num_layers)
        self._engine = self.policy.engine(architecture, self._requested_engine)
        self._idle = idle_report(architecture, self.policy)
        _sessions[self._model] = self
        try:
            self._engine.attach()
            self._attach(architecture)
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was found."""
        self._detach()
        if kind is None and self._steps == 0 and self.policy.unit == "ffn":
            logger.warning(
                "no decode step ran inside skipping(...): only the full model was used. "
                "For forward passes over a known text pass teacher_forced=True."
            )

    @property
    def report(self) -> SkipReport:
        """What was decoded and skipped so far."""
        if self._engine is None:
            raise SessionError("there is no report before the session is entered; use `with skipping(...)`")
        return replace(
            self._idle,
            decode_steps=self._steps,
            decode_steps_after_warm_up=self._ruled_steps,
            skipped_per_layer=tuple(self._engine.skipped_per_layer),
            weight_bytes_saved=self._engine.weight_bytes_saved,
            engine=self._engine.name,
            engine_reason=self._engine.reason,
        )

    # What is set on the model, and how it goes away

    def _attach(self, architecture: Architecture) -> None:
        model, stack = self._model, architecture.stack
        self._stack_signature = inspect.signature(stack.forward)
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            stack.register_forward_pre_hook(self._before_stack, with_kwargs=True),
        ]
        self._patches.set(model, "generate", self._generating(model.generate))
        # The one place where all criteria are together: the caller's, end of sequence, stop strings.
        criteria = model._get_stopping_criteria
        self._patches.set(model, "_get_stopping_criteria", self._clocked(criteria))
        for name in CONTINUOUS_BATCHING:
            self._patches.set(model, name, refuse_continuous_batching)

    def _detach(self) -> None:
        assert self._engine is not None
        self._engine.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._patches.restore()
        _sessions.pop(self._model, None)

    # Which tokens of a forward pass are decode steps

    def _before_model(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._model.training:
            raise SessionError("the model is in training mode; call model.eval() before skipping(...)")
        if kwargs.get("labels") is not None and not self._teacher_forced:
            raise SessionError(
                "a loss over labels would be the full model's, for nothing is skipped in a parallel "
                "forward pass; pass teacher_forced=True"
            )

    def _before_stack(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = call_arguments(self._stack_signature, args, kwargs)
        ids = given.get("input_ids")
        tokens = given["inputs_embeds"] if ids is None else ids
        ids = None if ids is None else ids.reshape(-1)
        batch, length = tokens.shape[:2]
        assert self._engine is not None
        if self._teacher_forced:
            steps = self._known_text_steps(given, batch, length, tokens.device)
            active = steps >= self.policy.warm_up_tokens
            self._steps += int((steps >= 0).sum())
            self._ruled_steps += int(active.sum())
            ruled = PassTokens(active=active, step=steps, ids=ids)
            self._engine.begin(ruled if bool(active.any()) else FULL_PASS)
            return
        cache = given.get("past_key_values")
        past = int(cache.get_seq_length()) if cache is not None else 0
        step = self._decode_step(past, length)
        if step is None:
            self._engine.begin(FULL_PASS)
            return
        live = self._clock.live(batch) if self._clock is not None else None
        decoded = batch if live is None else int(live.sum())
        self._steps += decoded
        if step < self.policy.warm_up_tokens:
            self._engine.begin(FULL_PASS)
            return
        self._ruled_steps += decoded
        active = torch.ones(batch, dtype=torch.bool, device=tokens.device)
        self._engine.begin(PassTokens(active=active, counted=live, step=step, ids=ids))

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
        steps = positions - torch.tensor(self._prompt_tokens, device=device)[:, None]
        return (steps if real is None else steps.masked_fill(~real, -1)).reshape(-1)

    def _decode_step(self, past: int, length: int) -> int | None:
        """Index of the decode step that this pass is, None for a prefill."""
        if self._clock is not None:  # inside generate()
            if self._clock.emitted == 0:
                return None
            if length != 1:
                raise SessionError(
                    f"generate() decoded {length} tokens in one pass; skipping needs a cache and one "
                    "token a pass (use_cache=True, no assisted decoding)"
                )
            return self._clock.emitted - 1
        if past == 0 or length > 1:
            self._refuse_foreign_cache(past)
            self._prefill_end = past + length
            return None
        if self._prefill_end is None:  # the prefill ran before the session began
            self._refuse_foreign_cache(past)
            self._prefill_end = past
        return past - self._prefill_end

    def _refuse_foreign_cache(self, past: int) -> None:
        if past and self.policy.unit == "layer":
            raise SessionError(
                f"{self.policy.method} leaves layers out, so it cannot go on from a cache that holds {past} "
                "tokens; begin with the whole text and an empty cache"
            )

    # generate()

    def _generating(self, original: Any) -> Any:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._teacher_forced:
                raise SessionError("a teacher_forced session does not generate; open one without it")
            given = call_arguments(signature, args, kwargs)
            options = prepare_options(given, self._model.generation_config)
            cache = given.get("past_key_values")
            self._refuse_foreign_cache(int(cache.get_seq_length()) if cache is not None else 0)
            self._clock = TokenClock()
            try:
                return original(**options)
            finally:
                self._clock = None

        return generate

    def _clocked(self, original: Any) -> Any:
        @functools.wraps(original)
        def get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
            criteria = original(*args, **kwargs)
            return criteria if self._clock is None else ClockedCriteria.around(criteria, self._clock)

        return get_stopping_criteria


def idle_report(architecture: Architecture, policy: Policy) -> SkipReport:
    """The report of a session in which nothing has run yet."""
    total = sum(block.layer_bytes for block in architecture.blocks)
    return SkipReport(
        decode_steps=0,
        decode_steps_after_warm_up=0,
        skipped_per_layer=(0,) * architecture.num_layers,
        weight_bytes_saved=0,
        engine="none",
        engine_reason="nothing has run",
        method=policy.method,
        unit=policy.unit,
        byte_shares=tuple(policy.saved_bytes(block) / total for block in architecture.blocks),
    )


def _refuse_unfit(outer: nn.Module, model: nn.Module) -> None:
    if model.training:
        raise SessionError("the model is in training mode; call model.eval() before skipping(...)")
    for module in (outer, *model.modules()):
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            raise SessionError(
                f"{type(module).__name__} is compiled, and a compiled forward ignores what is set on "
                "its modules; pass the model as it was before torch.compile"
            )
