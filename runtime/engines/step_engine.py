"""Engines that run decode steps of generate() by a prepared step, and everything else eagerly.

How a step is prepared is the engine's own: a CUDA graph (runtime.engines.graph) or a list of torch calls
(runtime.engines.recorded). Here is what they share: the step is made for a call of generate(), compared
with the model's own pass before its results are used, and given up, with a warning, for whatever
fails. What no prepared step can do, beams and caches of the caller's and passes over many tokens,
the eager engine inside does by the same rule, and the report says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from skipcal.arch.locate import Architecture
from skipcal.errors import first_words
from skipcal.runtime.engines.base import FULL_PASS, PassTokens
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.engines.prepared_step import PreparedStep
from skipcal.runtime.engines.step_cache import StepCache
from skipcal.runtime.rules import Rule
from skipcal.runtime.surrogates import Surrogates

logger = logging.getLogger(__name__)

_PROOFS = 2  # steps of different places: a place that was taken for a constant is right once
# A step and the model's own pass round alike but for the order of sums; a wrong mask, position or
# weight moves the logits by about their own size.
_PROOF_TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
_PROOF_TOLERANCE_HALF = 5e-2


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
        self._step: PreparedStep | None = None
        self._handed_out: StepCache | None = None  # the caller of generate() will keep it
        self._how: str | None = None  # of the steps that ran
        self._refusals: dict[str, None] = {}  # why something ran eagerly, each once
        self._failed = False

    @property
    def name(self) -> str:
        """The engine that ran decode steps; "eager" until there was one."""
        return "eager" if self._how is None else self.name_of_steps

    @property
    def reason(self) -> str:
        """Why this engine, how it ran the steps, and what it left to the eager one."""
        eager = "; ".join(self._refusals)
        if self._how is None:
            return f"{self.name_of_steps} was {self._why}; {eager or 'no decode step of generate() has run'}"
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
        """Put back what `attach` found, and give up the prepared steps."""
        self._eager.detach()
        self._step = None

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass of the model's own."""
        self._eager.begin(tokens)

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

        handed_out: the caller keeps the cache, so `end_call` makes it an ordinary one and the next call
                    gets another.
        """
        if self._failed:
            return None
        if reason := self._refused(forward, room):
            self.fall_back(reason)
            return None
        step = self._step
        fits = step is not None and step.batch == batch and step.room >= room
        if step is None or not fits or step.inference != torch.is_inference_mode_enabled():
            self._step = None  # its memory first
            step = self._new_step(forward, batch, room)
        self._step, self._handed_out = step, step.cache if handed_out else None
        return step.start()

    def takes(self, cache: Any) -> bool:
        """Whether a decode step with this cache is this engine's."""
        return self._step is not None and self._step.cache is cache and not self._failed

    def runs_ahead(self, cache: Any) -> bool:
        """Whether the next step may be launched before it is known to be wanted."""
        raise NotImplementedError

    def prepare(self, given: dict[str, Any]) -> bool:
        """Make the step over `given`, the arguments of the model's forward, possible; False: be eager."""
        assert self._step is not None
        self._eager.begin(FULL_PASS)
        try:
            self._step.prepare(given)
            if self._step.proofs < _PROOFS:
                self._prove(self._step, given)
        except Exception as error:  # whatever torch, Triton or the driver found: the eager engine is right
            self._give_up(f"the step could not be captured ({first_words(error)})")
        return not self._failed

    def run_no_sync(self, given: dict[str, Any], tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of one decode step, overwritten by the next one."""
        assert self._step is not None
        self._eager.begin(FULL_PASS)
        self._how = self._step.how
        return self._step.run_no_sync(given["input_ids"], given.get("position_ids"), tokens)

    def end_call(self) -> None:
        """A generate() call is over."""
        if self._handed_out is not None:
            self._handed_out.hand_out()
            self._handed_out = self._step = None

    def _new_step(self, forward: Callable[..., Any], batch: int, room: int) -> PreparedStep:
        """A step of this engine's kind. forward: the causal language model's."""
        raise NotImplementedError

    def _refused(self, forward: Callable[..., Any], room: int) -> str | None:
        """Why a call of generate() cannot have prepared steps; arguments as of `cache_for`."""
        window = _sliding_window(self._architecture)
        if window is not None and room > window:
            return f"{room} tokens are more than the attention window of {window}"
        return None

    def _prove(self, step: PreparedStep, given: dict[str, Any]) -> None:
        """Without skips a step has to give the logits of the model's own pass."""
        expected = step.model_logits(given).float()
        mine = step.run_no_sync(given["input_ids"], given.get("position_ids"), FULL_PASS).float()
        step.cache.rewind(1)
        limit = _PROOF_TOLERANCE.get(step.dtype, _PROOF_TOLERANCE_HALF)
        error = float(torch.linalg.vector_norm(mine - expected) / torch.linalg.vector_norm(expected))
        if error <= limit:
            step.proofs += 1
        else:
            self._give_up(
                f"its logits differ from the model's by {error:.1e} of their norm, over {limit:.0e}"
            )

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._step = None
        self.fall_back(reason)


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
