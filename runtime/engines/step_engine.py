"""Engines that run decode steps of generate() by a prepared step, and everything else eagerly.

How a step is prepared is the engine's own: a CUDA graph (runtime.engines.graph) or a list of torch calls
(runtime.engines.recorded). Here is what they share: the step is made for a call of generate(), compared
with the model's own pass before its results are used, kept for calls of as many rows until the session ends,
and given up, with a warning, for whatever fails. What no prepared step can do, beams and caches of the
caller's and passes over many tokens, the eager engine inside does by the same rule, and the report says so.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from skipcal.arch.blocks import rotary_settings
from skipcal.arch.locate import Architecture
from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.errors import first_words
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.engines.prepared_step import PreparedStep
from skipcal.runtime.engines.step_cache import Memories, Memory, StepCache

logger = logging.getLogger(__name__)

_PROOFS = 2  # steps of different places: a place that was taken for a constant is right once
_MISSES = 2  # a router may turn over by a rounding; hardly at the next place again
# Steps that a session keeps. Their caches share their memory; besides, a captured step has what its launches
# hand to each other.
MOST_STEPS = 8


class StepEngine:
    """Runs the decode steps with a cache that `cache_for` made; other passes run eagerly."""

    name_of_steps: ClassVar[str]

    def __init__(
        self, architecture: Architecture, rule: Rule, *, surrogates: Surrogates | None = None, asked: bool
    ) -> None:
        """asked: it was, by name; else it was chosen for the model's device."""
        device = next(architecture.stack.parameters()).device
        self._why = "asked for" if asked else f"chosen, for the model is on a {device.type}"
        # On a CPU the eager engine is nearly as fast; on a GPU to lose the other one is news.
        self._loss = logging.WARNING if asked or device.type != "cpu" else logging.INFO
        self._architecture, self._rule = architecture, rule
        self._surrogates = surrogates or Surrogates({})
        self._eager = EagerEngine(architecture, rule, surrogates=surrogates)
        self._memories: Memories = _memories(architecture)
        # By rows and inference mode, whose tensors are of no use outside; the one used last comes last.
        self._steps: dict[tuple[int, bool], PreparedStep] = {}
        self._step: PreparedStep | None = None  # of the present call of generate(), or of the last
        self._cache: StepCache | None = None  # of the present call
        self._handed_out = False  # the caller will keep it
        self._how: str | None = None  # of the steps that ran
        self._refusals: dict[str, None] = {}  # why something ran eagerly, each once
        self._failed = False
        self.prepared_passes = 0
        self.setup_s = 0.0

    @property
    def name(self) -> str:
        """The engine of decode steps; "eager" until there was a prepared one, and once it was given up."""
        return "eager" if self._how is None or self._failed else self.name_of_steps

    @property
    def reason(self) -> str:
        """Why this engine, how it ran the steps, and what it left to the eager one."""
        eager = "; ".join(self._refusals)
        if self._how is None:
            return f"{self.name_of_steps} was {self._why}; {eager or 'no decode step of generate() has run'}"
        if self._failed:
            ran = f"given up after {self.prepared_passes} steps"
            return f"{self.name_of_steps} was {self._why}, and {ran}; {eager}"
        return f"{self._why}; {self._how}" + (f"; eager in part: {eager}" if eager else "")

    @property
    def skipped_per_layer(self) -> list[int]:
        """Skipped FFN blocks of live rows, by layer."""
        return self._eager.skipped_per_layer

    @property
    def weight_bytes_saved(self) -> int:
        """Bytes of weights not read: a block's once for each pass in which every row skipped it."""
        return self._eager.weight_bytes_saved

    @property
    def row_decisions(self) -> tuple[int, int]:
        """Decisions on which all live rows agreed, and decisions; (0, 0) where it is not measured."""
        return self._eager.row_decisions

    def attach(self) -> None:
        """Set on the model what eager passes need."""
        self._eager.attach()

    def detach(self) -> None:
        """Put back what `attach` found, and let go of the prepared steps and of their memory."""
        self._eager.detach()
        self._forget_steps()

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass of the model's own."""
        self._eager.begin(tokens)

    def end(self) -> None:
        """A forward pass of the model's own is over."""
        self._eager.end()

    def fall_back(self, reason: str) -> None:
        """Say once that, and why, the eager engine takes over."""
        if reason not in self._refusals:
            self._refusals[reason] = None
            said = "engine %s cannot run this: %s; the eager engine does"
            logger.log(self._loss, said, self.name_of_steps, reason)

    def cache_for(
        self, forward: Callable[..., Any], batch: int, room: int, *, handed_out: bool
    ) -> StepCache | None:
        """An empty cache for `batch` rows of at most `room` tokens, whose steps `run` takes; None: eager.

        handed_out: the caller keeps the cache, so `end_call` makes it an ordinary one with a copy of what is
                    in it, and the step goes on with its own.
        """
        self._eager.begin(FULL_PASS)  # a step tries modules of the model's on rows of its own
        if self._failed:
            return None
        if reason := self._refused(forward, room):
            self.fall_back(reason)
            return None
        kind = batch, torch.is_inference_mode_enabled()
        step = self._steps.pop(kind, None)
        if step is None or step.room < room:
            self._step = None
            with self._setting_up():  # which has waited for the device: nothing is let go that still runs
                step = None
                while len(self._steps) >= MOST_STEPS:
                    del self._steps[next(iter(self._steps))]
                step = self._new_step(forward, batch, room)
        self._steps[kind] = self._step = step
        self._cache, self._handed_out = step.start(room), handed_out
        return self._cache

    def takes(self, cache: Any) -> bool:
        """Whether a decode step with this cache is this engine's."""
        return self._step is not None and self._step.cache is cache and not self._failed

    def runs_ahead(self, cache: Any) -> bool:
        """Whether the next step may be launched before it is known to be wanted."""
        raise NotImplementedError

    def prepare(self, given: dict[str, Any]) -> bool:
        """Whether the step over `given`, the arguments of the model's forward, is prepared; else be eager."""
        step = self._step
        assert step is not None
        self._eager.begin(FULL_PASS)
        try:
            step.settle(given)
            if self._is_ready(step):
                return True
            with self._setting_up():
                if not step.is_made:
                    step.make(given)
                return step.proofs >= _PROOFS or self._prove(step, given)
        except Exception as error:  # whatever torch, Triton or the driver found: the eager engine is right
            logger.debug("engine %s: no step", self.name_of_steps, exc_info=True)
            self._give_up(f"the step could not be captured ({first_words(_first_cause(error))})")
            return False

    def run_no_sync(self, given: dict[str, Any], tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of one decode step, overwritten by the next one."""
        assert self._step is not None
        self._eager.begin(FULL_PASS)
        self._how = self._step.how
        self.prepared_passes += 1
        return self._step.run_no_sync(given["input_ids"], given.get("position_ids"), tokens)

    def end_call(self) -> None:
        """A generate() call is over: its cache is the caller's, or empty."""
        if self._cache is None:
            return
        kept = self._cache.hand_out() if self._handed_out else self._cache
        kept.clear()
        if self._step is not None:
            self._step.cache = kept
        self._cache = None

    def _new_step(self, forward: Callable[..., Any], batch: int, room: int) -> PreparedStep:
        """A step of this engine's kind. forward: the causal language model's."""
        raise NotImplementedError

    def _refused(self, forward: Callable[..., Any], room: int) -> str | None:
        """Why a call of generate() cannot have prepared steps; arguments as of `cache_for`."""
        window = _sliding_window(self._architecture)
        if window is not None and room > window:
            return f"{room} tokens are more than the attention window of {window}"
        return None

    @staticmethod
    def _is_ready(step: PreparedStep) -> bool:
        """Whether the step can be run, and has been proven."""
        return step.is_made and step.proofs >= _PROOFS

    def _prove(self, step: PreparedStep, given: dict[str, Any]) -> bool:
        """Whether the step may be used: without skips it has to be the model's own pass, but for rounding."""
        for found in step.deviations(given):
            logger.debug("engine %s: %s", self.name_of_steps, found)
            if not found.is_noise:
                step.misses += 1
                if step.misses >= _MISSES:
                    self._give_up(str(found))
                else:
                    self._refusals[f"one step, where {found}"] = None
                return False
        step.proofs += 1
        return True

    @contextmanager
    def _setting_up(self) -> Iterator[None]:
        """Inside, time counts as `setup_s`; on a GPU, once it has done what it was given before."""
        device = next(self._architecture.stack.parameters()).device
        wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
        wait(device)
        start = time.perf_counter()
        try:
            yield
        finally:
            wait(device)
            self.setup_s += time.perf_counter() - start

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._forget_steps()
        self.fall_back(reason)

    def _forget_steps(self) -> None:
        self._step = None
        self._steps.clear()
        for memory in itertools.chain.from_iterable(self._memories):
            memory.free()  # at once: a recorded step is a circle
        self._memories = _memories(self._architecture)


def _memories(architecture: Architecture) -> Memories:
    return [(Memory(), Memory()) for _ in range(architecture.num_layers)]


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong first: what a failed capture raises on its way out tells nothing."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def refusal(architecture: Architecture) -> str | None:
    """Why no decode step of the model can be prepared; None: it can be tried."""
    stack: Any = architecture.stack
    if any(hasattr(p, "device_mesh") for p in stack.parameters()):
        return "the weights are divided over processes"
    devices = {p.device for p in stack.parameters()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in stack.modules()):
        return "the weights lie on several devices, or are moved about"
    kinds = set(getattr(stack.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if any(block.attention is not None for block in architecture.blocks):
        return "attention and FFN are parallel, and a captured step knows no stream between them"
    if not all(block.adds_to_its_input and block.family.summed == 1 for block in architecture.blocks):
        return "the layers scale the stream, or add up several outputs, where a captured step would not"
    if any(block.family.whole for block in architecture.blocks):
        return "the layers mix other paths into their FFNs"
    if kinds:
        return f"layers of type {', '.join(sorted(kinds))} keep no plain keys and values"
    ropes = {str(rope.get("rope_type")) for rope in rotary_settings(stack.config)}
    branching = sorted(kind for kind in ropes if "dynamic" in kind or kind == "longrope")
    if branching:  # a prepared step would keep the branch that it was made in
        return f"its rotary embedding ({', '.join(branching)}) looks at how long the text has become"
    return None


def _sliding_window(architecture: Architecture) -> int | None:
    """Tokens that the narrowest attention of the model sees; None: all."""
    config: Any = architecture.stack.config
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return None
    if getattr(config, "use_sliding_window", True) is False:
        return None
    window: int | None = getattr(config, "sliding_window", None)
    return window
