"""`skipping`: run an untouched transformers model with FFN blocks left out.

A session knows which of the tokens of a forward pass are decode steps past the warm-up; the
engine below it decides and skips. It stands around plain `generate()`, around a decoding loop of
your own, or (`teacher_forced=True`) around parallel forward passes over a known text.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from torch import nn

from skipcal.arch.blocks import parallel_limit
from skipcal.arch.locate import Architecture, locate, unwrap
from skipcal.arch.patch import InstancePatches
from skipcal.configs.names import check_engine
from skipcal.core.batch_rule import BATCH_RULES
from skipcal.core.host import FULL_PASS, Watcher
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.report import SkipReport
from skipcal.errors import ConfigError, SessionError
from skipcal.profiles.schema import SkipProfile
from skipcal.runtime.engines.base import Engine
from skipcal.runtime.engines.choice import engine_for
from skipcal.runtime.engines.generate_loop import with_decode_ahead
from skipcal.runtime.engines.generate_seam import GenerateSeam
from skipcal.runtime.engines.step_engine import StepEngine
from skipcal.runtime.engines.whole_layers import RemovedLayers
from skipcal.runtime.generate_call import (
    CONTINUOUS_BATCHING,
    ClockedCriteria,
    TokenClock,
    call_arguments,
    prepare_options,
    refuse_continuous_batching,
    signature_of,
)
from skipcal.runtime.tokens import DecodeTokens
from skipcal.runtime.turn import Turn

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
    batch_rule: str = "rows",
    architecture: Architecture | None = None,
) -> SkipSession:
    """Return a context manager inside which `model` skips FFN blocks (or layers, by some baselines).

    profile:           whose recommended policy applies; `target_skip_ratio` picks another of its
                       operating points.
    policy:            instead of a profile: a SkipPolicy, or what `skipcal.make_policy` makes.
    teacher_forced:    skip in parallel forward passes over whole sequences. Positions below
                       `prompt_tokens` (one number, or one for each row of the batches to come) are
                       the prefill; position p is decode step p - prompt_tokens. Decisions and
                       logits equal those of decoding the same text token by token.
    engine:            "auto", "eager", or how decode steps of generate() are made cheaper: "graph" (CUDA
                       graphs) or "recorded" (on a CPU). What these cannot run, the eager engine runs,
                       with a warning.
    batch_rule:        "rows": each row by its own cosine; "all" or "mean": the rows of a batch arm
                       together, where all their cosines or their mean reach the threshold.
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
    if batch_rule not in BATCH_RULES:
        raise ConfigError(f"batch_rule {batch_rule!r} is not one of {', '.join(BATCH_RULES)}")
    if batch_rule != "rows" and (teacher_forced or not isinstance(policy, SkipPolicy)):
        raise ConfigError(
            f"batch_rule {batch_rule!r} joins the rows of a decode step under the rule cosine; "
            "it has no meaning for teacher_forced=True, nor for other methods"
        )
    return SkipSession(model, policy, teacher_forced, prompts, engine, architecture, batch_rule)


class SkipSession:
    """One use of a model under a policy. Enter it once; read `report` inside or afterwards.

    It follows one call at a time, whichever thread makes it. Leaving it stops a call that still runs.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        teacher_forced: bool,
        prompt_tokens: list[int],
        engine: str,
        architecture: Architecture | None,
        batch_rule: str,
    ) -> None:
        """Use `skipping`, which checks the arguments."""
        self.policy = policy
        self._outer = model
        self._model = unwrap(model)
        self._requested_engine = engine
        self._batch_rule = batch_rule
        self._architecture = architecture
        self._engine: Engine | None = None
        self._seam: GenerateSeam | None = None
        self._tokens = DecodeTokens(policy, teacher_forced=teacher_forced, prompt_tokens=prompt_tokens)
        self._shortest_prompt = min(prompt_tokens)
        self._watcher: Watcher | None = None
        self._eager_passes = 0
        self._turn = Turn()
        self._patches = InstancePatches(self._model)
        self._wrapped = False  # somebody else goes on calling our generate() after the session

    def watch(self, watcher: Watcher) -> None:
        """Have `watcher(layer, skip)` told which tokens of the passes to come skip what.

        skip: [batch * seq] bool; a layer that no token skips is not told. Raises SessionError unless the
        session is teacher-forced: captured decode steps keep their decisions on the device.
        """
        if not self._tokens.teacher_forced:
            raise SessionError("only a session with teacher_forced=True can be watched; open one with it")
        self._watcher = watcher

    def __enter__(self) -> Self:
        """Prepare the model; nothing is changed on it when this raises."""
        if self._engine is not None:
            raise SessionError("this session was entered before; call skipping(...) again for a new one")
        if _sessions.setdefault(self._model, self) is not self:
            raise SessionError("the model is already inside a skipping(...) block; leave that one first")
        try:
            self._enter()
        except BaseException:
            self._detach()
            raise
        return self

    def _enter(self) -> None:
        _refuse_unfit(self._outer, self._model)
        architecture = self._architecture or locate(self._model)
        self.policy.check_layers(architecture.num_layers)
        self._engine = engine_for(
            self.policy, architecture, self._requested_engine, batch_rule=self._batch_rule
        )
        asked = self._requested_engine
        if asked not in ("auto", "eager") and not isinstance(self._engine, StepEngine):
            logger.warning("engine %s is not used: %s", asked, self._engine.reason)
        self._idle = idle_report(architecture, self.policy)
        if self._tokens.teacher_forced:
            config: Any = architecture.stack.config
            self._tokens.longest = parallel_limit(config, self._shortest_prompt)
        self._engine.attach()
        self._attach(architecture)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the model as it was found, after what still runs in another thread has been stopped."""
        try:
            self._turn.close()
        finally:
            self._detach()
        if kind is None and int(self._tokens.steps) == 0 and self.policy.unit == "ffn":
            logger.warning(
                "no decode step ran inside skipping(...): only the full model was used. "
                "For forward passes over a known text pass teacher_forced=True."
            )

    @property
    def report(self) -> SkipReport:
        """What was decoded and skipped so far."""
        if self._engine is None:
            raise SessionError("there is no report before the session is entered; use `with skipping(...)`")
        alike, decisions = self._engine.row_decisions
        return replace(
            self._idle,
            decode_steps=int(self._tokens.steps),
            decode_steps_after_warm_up=int(self._tokens.ruled_steps),
            skipped_per_layer=tuple(self._engine.skipped_per_layer),
            weight_bytes_saved=self._engine.weight_bytes_saved,
            engine=self._engine.name,
            engine_reason=self._engine.reason,
            row_decisions=decisions,
            row_decisions_alike=alike,
            prepared_passes=self._engine.prepared_passes,
            eager_passes=self._eager_passes,
            setup_s=self._engine.setup_s,
        )

    @property
    def setup_s(self) -> float:
        """Seconds in which steps were prepared so far; `report` has it too, but waits for the device."""
        return 0.0 if self._engine is None else self._engine.setup_s

    # What is set on the model, and how it goes away

    def _attach(self, architecture: Architecture) -> None:
        model, stack = self._model, architecture.stack
        self._stack_signature = signature_of(stack, "forward")
        self._patches.before_forward(model, self._before_model)
        self._patches.before_forward(stack, self._before_stack)
        self._patches.after_forward(stack, self._after_stack, always_call=True)
        self._patches.set(model, "generate", self._generating(model.generate))
        # The one place where all criteria are together: the caller's, end of sequence, stop strings.
        criteria = model._get_stopping_criteria
        self._patches.set(model, "_get_stopping_criteria", self._clocked(criteria))
        if isinstance(self._engine, StepEngine) and not self._tokens.teacher_forced:
            self._seam = GenerateSeam(model, self._engine, self._tokens)
            self._seam.attach(self._patches)
        for name in CONTINUOUS_BATCHING:
            self._patches.set(model, name, self._refusing(getattr(model, name)))
        if isinstance(self._engine, RemovedLayers):
            self._patches.set(model, "save_pretrained", self._engine.refuse_copies)

    def _detach(self) -> None:
        try:
            if self._engine is not None:
                self._engine.detach()
        finally:
            self._wrapped |= "generate" in self._patches.restore()
            self._seam = None
            if _sessions.get(self._model) is self:
                del _sessions[self._model]

    def _before_model(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._turn.check()
        if self._model.training:
            raise SessionError("the model is in training mode; call model.eval() before skipping(...)")
        if kwargs.get("labels") is not None and not self._tokens.teacher_forced:
            raise SessionError(
                "a loss over labels would be the full model's, for nothing is skipped in a parallel "
                "forward pass; pass teacher_forced=True"
            )

    def _before_stack(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._turn.begin_pass()
        if self._stepping:
            return
        assert self._engine is not None
        given = call_arguments(self._stack_signature, args, kwargs)
        tokens = self._tokens.of_pass(given)
        if not self._tokens.teacher_forced and tokens is not FULL_PASS:
            self._eager_passes += 1
        self._engine.begin(replace(tokens, watcher=self._watcher) if self._watcher else tokens)

    def _after_stack(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """output: None where the pass has failed, or was refused by a hook before it."""
        if not self._turn.mine:
            return
        try:
            if output is None:
                self._rest()
            elif not self._stepping:
                assert self._engine is not None
                self._engine.end()
        finally:
            self._turn.end_pass()

    @property
    def _stepping(self) -> bool:
        """Whether the pass is part of a prepared step, or of making one."""
        return self._seam is not None and self._seam.stepping

    def _rest(self) -> None:
        """Let what is called between passes be the model's own."""
        assert self._engine is not None
        self._engine.begin(FULL_PASS)

    # generate()

    def _generating(self, original: Any) -> Any:
        signature = signature_of(self._model, "generate")

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if self._wrapped:
                return original(*args, **kwargs)
            given = call_arguments(signature, args, kwargs)
            try:
                with self._turn.taken():
                    return self._generate(original, given)
            except SessionError:
                if given.get("streamer") is not None:
                    given["streamer"].end()  # somebody in another thread may be reading from it
                raise

        return generate

    def _generate(self, original: Any, given: dict[str, Any]) -> Any:
        """`original`, which is generate(), with the arguments `given` by name."""
        if self._tokens.teacher_forced:
            raise SessionError("a teacher_forced session does not generate; open one without it")
        options = prepare_options(given, self._model.generation_config)
        cache = given.get("past_key_values")
        self._tokens.refuse_foreign_cache(int(cache.get_seq_length()) if cache is not None else 0)
        self._tokens.clock = TokenClock()
        if isinstance(self._engine, StepEngine):
            options = with_decode_ahead(options, self._engine.runs_ahead)
        try:
            return original(**options)
        finally:
            self._tokens.clock = None
            self._rest()
            if isinstance(self._engine, StepEngine):
                self._engine.end_call()

    def _clocked(self, original: Any) -> Any:
        @functools.wraps(original)
        def get_stopping_criteria(*args: Any, **kwargs: Any) -> Any:
            criteria = original(*args, **kwargs)
            clock = self._tokens.clock
            return criteria if clock is None else ClockedCriteria.around(criteria, clock)

        return get_stopping_criteria

    def _refusing(self, original: Any) -> Any:
        """A method of continuous batching, refused until the session is over."""

        @functools.wraps(original)
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if not self._turn.over:
                refuse_continuous_batching()
            return original(*args, **kwargs)

        return refuse


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
