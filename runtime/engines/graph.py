"""The graph engine: decode steps of generate() as CUDA graphs, everything else by the eager engine.

A step is captured whole (runtime.engines.graph_step), with the skip decision on the device, so the
host launches one graph a token and waits for nothing. What no captured step can do, beams and
caches of the caller's and passes over many tokens, the eager engine inside does by the same rule,
and the report says so. On a CPU the same step runs uncaptured: slower, and the proof of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from skipcal.arch.locate import Architecture
from skipcal.errors import first_words
from skipcal.runtime.engines.base import FULL_PASS, PassTokens
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.engines.graph_cache import StepCache
from skipcal.runtime.engines.graph_rules import StepCounts
from skipcal.runtime.engines.graph_step import DecodeStep
from skipcal.runtime.rules import Rule
from skipcal.runtime.surrogates import Surrogates

logger = logging.getLogger(__name__)

_ATTENTION = ("eager", "sdpa")  # those that take a mask for one token
# A step and the model's own pass round alike but for the order of sums; a wrong mask, position or
# weight moves the logits by about their own size.
_PROOF_TOLERANCE = {torch.float32: 5e-3, torch.float64: 5e-3}
_PROOF_TOLERANCE_HALF = 5e-2


class GraphEngine:
    """Runs the decode steps that `step_for` is given a cache for; other passes run eagerly."""

    def __init__(
        self, architecture: Architecture, rule: Rule, *, surrogates: Surrogates | None = None, why: str
    ) -> None:
        """why: the engine was chosen, for the report."""
        self._architecture, self._rule = architecture, rule
        self._surrogates = surrogates or Surrogates({})
        self._eager = EagerEngine(architecture, rule, surrogates=surrogates)
        self._why = why
        self._device = next(architecture.stack.parameters()).device
        self._counts = StepCounts(architecture.num_layers, tuple(rule.layers), self._device)
        self._step: DecodeStep | None = None
        self._how: str | None = None  # of the steps that ran
        self._refusals: dict[str, None] = {}  # why something ran eagerly, each once
        self._failed = False

    @property
    def name(self) -> str:
        """The engine that ran decode steps: "graph", until then "eager"."""
        return "eager" if self._how is None else "graph"

    @property
    def reason(self) -> str:
        """Why this engine, how it ran the steps, and what it left to the eager one."""
        eager = "; ".join(self._refusals)
        if self._how is None:
            return f"graph was {self._why}; {eager or 'no decode step of generate() has run'}"
        capture = "one CUDA graph a step" if self._device.type == "cuda" else "not captured, on a CPU"
        return f"{self._why}; {capture}; {self._how}" + (f"; eager in part: {eager}" if eager else "")

    @property
    def skipped_per_layer(self) -> list[int]:
        """Skipped FFN blocks of live rows, by layer."""
        skipped, _, _ = self._counts.read()
        return [a + b for a, b in zip(skipped, self._eager.skipped_per_layer, strict=True)]

    @property
    def weight_bytes_saved(self) -> int:
        """Bytes of weights not read: a block's once for each pass in which every row skipped it."""
        _, by_all, by_some = self._counts.read()
        saved = self._eager.weight_bytes_saved
        for block, all_rows, some in zip(self._architecture.blocks, by_all, by_some, strict=True):
            saved += all_rows * block.weight_bytes - some * self._surrogates.weight_bytes(block.index)
        return saved

    @property
    def row_decisions(self) -> tuple[int, int]:
        """Decisions on which all live rows agreed, and decisions."""
        return self._counts.agreement()

    def attach(self) -> None:
        """Set on the model what eager passes need."""
        self._eager.attach()

    def detach(self) -> None:
        """Put back what `attach` found, and give up the captured steps."""
        self._eager.detach()
        self._step = None

    def begin(self, tokens: PassTokens) -> None:
        """Announce a forward pass of the model's own."""
        self._eager.begin(tokens)

    def fall_back(self, reason: str) -> None:
        """Say once that, and why, the eager engine takes over."""
        if reason not in self._refusals:
            self._refusals[reason] = None
            logger.warning("engine graph cannot run this: %s; the eager engine does", reason)

    def cache_for(
        self, forward: Callable[..., Any], batch: int, room: int, *, handed_out: bool
    ) -> StepCache | None:
        """An empty cache for `batch` rows of at most `room` tokens, whose steps `run` takes; None: eager.

        handed_out: the caller keeps the cache, so the next call gets another.
        """
        window = _sliding_window(self._architecture)
        if self._failed:
            return None
        if window is not None and room > window:
            self.fall_back(f"{room} tokens are more than the attention window of {window}")
            return None
        step = self._step
        fits = step is not None and step.batch == batch and step.room >= room
        if step is None or not fits or step.inference != torch.is_inference_mode_enabled():
            self._step = None  # its memory first
            step = DecodeStep(
                forward,
                self._architecture,
                self._rule,
                batch=batch,
                room=room,
                surrogates=self._surrogates,
                counts=self._counts,
                extras=self._eager.extras,
            )
        self._step, self._handed_out = step, handed_out
        return step.start()

    def takes(self, cache: Any) -> bool:
        """Whether a decode step with this cache is this engine's."""
        return self._step is not None and self._step.cache is cache and not self._failed

    def prepare(self, given: dict[str, Any]) -> bool:
        """Make the step over `given`, the arguments of the model's forward, possible; False: be eager."""
        assert self._step is not None
        self._eager.begin(FULL_PASS)
        try:
            self._step.prepare(given.get("attention_mask"))
            if not self._step.proven:
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
        if self._step is not None and self._handed_out:
            self._step = None

    def _prove(self, step: DecodeStep, given: dict[str, Any]) -> None:
        """Once for each new step: without skips it has to give the logits of the model's own pass."""
        expected = step.model_logits(given).float()
        mine = step.run_no_sync(given["input_ids"], given.get("position_ids"), FULL_PASS).float()
        step.cache.rewind(1)
        limit = _PROOF_TOLERANCE.get(step.dtype, _PROOF_TOLERANCE_HALF)
        error = float(torch.linalg.vector_norm(mine - expected) / torch.linalg.vector_norm(expected))
        if error <= limit:
            step.proven = True
        else:
            self._give_up(
                f"its logits differ from the model's by {error:.1e} of their norm, over {limit:.0e}"
            )

    def _give_up(self, reason: str) -> None:
        self._failed = True
        self._step = None
        self.fall_back(reason)


def refusal(architecture: Architecture) -> str | None:
    """Why no decode step of the model can be captured; None: it can be tried."""
    stack: Any = architecture.stack
    devices = {p.device for p in stack.parameters()}
    if len(devices) > 1 or any(hasattr(module, "_hf_hook") for module in stack.modules()):
        return "the weights lie on several devices, or are moved about"
    if (device := devices.pop()).type not in ("cpu", "cuda"):
        return f"{device.type} has no CUDA graphs"
    attention = stack.config._attn_implementation
    if attention not in _ATTENTION:
        return f"attention {attention!r} takes no mask for one token; {' or '.join(_ATTENTION)} does"
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
