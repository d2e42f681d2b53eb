"""One decode step of a batch as a single CUDA graph: the model's own forward, its FFNs predicated.

The step is what the model's `forward` does with one token a row, a cache that stays in place and
FFN blocks that decide on the device. Captured, all of it is one launch; the host says which tokens,
where they stand and whether the warm-up is over, and does not wait for the answer. Where
torch's attention is asked for, skipcal.ops.decode_attention reads the places in use; any other reads a
window of the cache, a power of two that holds the text: one capture for each window.

On a CPU nothing is captured: the same function runs anew each time.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from skipcal.arch.locate import Architecture, Block
from skipcal.arch.patch import InstancePatches
from skipcal.core.cosine import CosineRule
from skipcal.core.gate import GateRule
from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.core.rule import Rule
from skipcal.core.surrogates import Surrogates
from skipcal.ops.ffn import FFNWeights
from skipcal.ops.lang import padded
from skipcal.ops.rules import FusedCosine, FusedGate, StepRule, Unasked
from skipcal.runtime.engines.graph_attention import Sight, step_attention
from skipcal.runtime.engines.graph_ffn import FusedFFN, ModuleFFN, StepFFN, fused_weights
from skipcal.runtime.engines.graph_layer import (
    AttentionWeights,
    FusedLayer,
    attention_weights,
)
from skipcal.runtime.engines.graph_outside import Outside
from skipcal.runtime.engines.graph_rules import AnyRule, StepCounts, StepInputs
from skipcal.runtime.engines.if_node import prepare_if_nodes
from skipcal.runtime.engines.prepared_step import PreparedStep
from skipcal.runtime.engines.step_cache import Memories
from skipcal.runtime.engines.step_proof import Deviation, LayerStreams, logits_deviation

MIN_WINDOW = 256
# Of a cache, which grows with its text up to what the call may need; and the least room of a step, so that
# longer prompts find it.
FIRST_SLOTS = 1024
_ROW = 16  # bytes to which a row of flags is filled up
# Of what a layer adds to its stream (and of logits made of one and the same stream), and of a captured step
# from an uncaptured one, whose libraries may sum in another order. tests/step_proof.json: over 200 models of
# 16 to 48 layers the noise of a layer is at most 0.009 of what it adds in half precision, 5e-7 in float32.
_LIMITS = {torch.float32: (1e-2, 5e-3), torch.float64: (1e-2, 5e-3)}
_HALF_LIMITS = (2e-2, 2e-1)
_Key = tuple[int, tuple[int, int], bool, bool]
_WARM_UPS = 2  # before a capture: libraries set themselves up, kernels are compiled


class DecodeStep(PreparedStep):
    """One decode step of `batch` rows of at most `room` tokens."""

    def __init__(
        self,
        forward: Callable[..., Any],
        architecture: Architecture,
        memories: Memories,
        rule: Rule,
        *,
        batch: int,
        room: int,
        surrogates: Surrogates,
        counts: StepCounts,
        extras: Callable[[int], int],
    ) -> None:
        """forward: the causal language model's. extras: outputs besides f of a layer's FFN module.

        room: at least; it becomes a power of two. Layers are tried and kernels compiled by `make`: it takes
        time, and the first token of a call need not wait for it.
        """
        room = max(padded(room), FIRST_SLOTS)
        super().__init__(forward, architecture, memories, batch=batch, room=room, slots=FIRST_SLOTS)
        self.device = device = next(architecture.stack.parameters()).device
        # Other attention functions mean something else by their arguments, so they stay, with windows.
        self._reads_used = self._config._attn_implementation == "sdpa"
        self._counts = counts
        self.inputs = StepInputs(batch, room, device)
        self._places = torch.arange(room, device=device)
        self._padded = False
        self._tabled = True  # positions do not run ahead of places
        # Each layer's begin where kernels like to read. The last is written by the region's last layer, and
        # nobody reads it.
        self._skips_static = torch.zeros(
            architecture.num_layers + 1, _ROW * -(-batch // _ROW), dtype=torch.bool, device=device
        )
        self._skips = self._skips_static[:, :batch]
        self._architecture, self._layers = architecture, architecture.blocks
        self._asked, self._surrogates, self._extras = rule, surrogates, extras
        self._sight = Sight(self.inputs.place_static[0], None)
        self._is_built = False
        self._logits_static: Tensor  # [batch, vocabulary]
        self._graphs: dict[_Key, torch.cuda.CUDAGraph] = {}

    def settle(self, given: dict[str, Any]) -> None:
        """Take the padding of a new text, and have room in the cache.

        given: the arguments of the model's forward, of which the attention mask counts: [batch, tokens
        so far], or None without padding; and where the positions begin, which a caller may have set.
        """
        if self.fresh:
            mask: Tensor | None = given.get("attention_mask")
            self._padded = mask is not None and not bool(mask.all())
            if mask is not None and self._padded:
                self.inputs.valid_static.fill_(True)
                self.inputs.valid_static[:, : mask.shape[1]] = mask.bool()
            positions: Tensor | None = given.get("position_ids")
            self._tabled = positions is None or bool(positions.max() <= self.cache.get_seq_length())
            self.fresh = False
        self.cache.make_room()

    @property
    def is_made(self) -> bool:
        """Whether the step is captured; on a CPU, whether it is built."""
        return self._is_built and (self.device.type != "cuda" or self._key() in self._graphs)

    def make(self, given: dict[str, Any]) -> None:
        """Build the step, and capture it for the present window."""
        with self._on_device():
            if not self._is_built:
                self._build()
            if self.device.type == "cuda":
                self._capture()

    def deviations(self, given: dict[str, Any]) -> list[Deviation]:
        """Of each layer and the logits, uncaptured and led; then of the captured step from the uncaptured."""
        ids, positions = given["input_ids"], given.get("position_ids")
        streams = LayerStreams(self._layers)
        with streams.noting():
            own = self._model_logits(given)
        place = self.cache.get_seq_length()
        limit, captured_limit = _LIMITS.get(self.dtype, _HALF_LIMITS)
        with self._on_device():
            self.inputs.set_no_sync(ids=ids, positions=positions, place=place, tokens=FULL_PASS)
            with streams.leading():
                led = self._compute()
            found = [streams.worst(limit), logits_deviation("the result of a step", led, own, limit)]
            if (graph := self._graphs.get(self._key())) is not None:
                free = self._compute().clone()
                graph.replay()
                captured = self._logits_static
                found.append(logits_deviation("a captured step", captured, free, captured_limit))
        return found

    def run_no_sync(self, ids: Tensor, positions: Tensor | None, tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of the next token; the next step overwrites them."""
        place = self.cache.get_seq_length()
        with self._on_device():
            self.inputs.set_no_sync(ids=ids, positions=positions, place=place, tokens=tokens)
            graph = self._graphs.get(self._key())
            if graph is None:
                self._compute()
            else:
                graph.replay()
        self.cache.advance()
        return self._logits_static

    def _build(self) -> None:
        """Find out how each layer runs, which tries it."""
        self._ffns, self._rule, how = self._blocks(
            self._architecture, self._asked, self._surrogates, self._extras
        )
        self._fused = len(self._ffns) == len(self._layers) and all(
            isinstance(ffn, FusedLayer) for ffn in self._ffns
        )
        self._outside: Outside | None = None
        if self._fused:
            stack, hidden = self._architecture.stack, self._architecture.hidden_size
            with torch.no_grad():
                self._outside = Outside(stack, hidden, self.room)
        capture = "one CUDA graph a step" if self.device.type == "cuda" else "not captured, on a CPU"
        self.how = f"{capture}; {how}"
        self._is_built = True

    def _blocks(
        self,
        architecture: Architecture,
        rule: Rule,
        surrogates: Surrogates,
        extras: Callable[[int], int],
    ) -> tuple[list[StepFFN], StepRule, str]:
        """The FFN blocks that are not the model's own, the rule, and in words how they run.

        The kernels stand for the layers of which the rule is not asked too: a step without a rule is then
        the same step, and what a rule gains over it is skipping alone.
        """
        found = {block.index: fused_weights(block, self.batch) for block in architecture.blocks}
        asked = {index: found[index] for index in rule.layers}
        modules = {index: why for index, why in asked.items() if isinstance(why, str)}
        active, live = self.inputs.active_static, self.inputs.counted_static
        step_rule: StepRule
        if isinstance(rule, CosineRule) and not modules:
            step_rule = FusedCosine(rule, active=active, live=live, skips=self._skips)
        elif isinstance(rule, GateRule):
            step_rule = FusedGate(rule, active=active, skips=self._skips)
        else:
            step_rule = AnyRule(rule, self.inputs, self._skips)
        ffns: list[StepFFN] = []
        parted: dict[int, str] = {}  # layers of which the FFN alone is in kernels, and why
        for block in architecture.blocks:
            weights = found[block.index]
            rules: tuple[StepRule, Surrogates] = (step_rule, surrogates)
            if block.index not in asked:
                rules = (Unasked(self._skips), Surrogates({}))
            if isinstance(weights, FFNWeights):
                attention = self._attention_weights(architecture, block, weights)
                if isinstance(attention, AttentionWeights):
                    ffns.append(FusedLayer(block, attention, weights, *rules, self._sight))
                else:
                    ffns.append(FusedFFN(block, weights, *rules))
                    parted[block.index] = attention
            elif block.index in asked:
                ffns.append(ModuleFFN(block, *rules, extras))
        fused = len(ffns) - len(modules) - len(parted)
        words = [f"{fused} layers fused"] if fused else []
        for reasons, how in ((parted, "FFNs in predicated kernels"), (modules, "as modules in IF nodes")):
            if reasons:
                words.append(f"{len(reasons)} {how} ({'; '.join(dict.fromkeys(reasons.values()))})")
        return ffns, step_rule, ", ".join(words) or "no FFN to skip"

    def _attention_weights(
        self, architecture: Architecture, block: Block, weights: FFNWeights
    ) -> AttentionWeights | str:
        """Of a layer that can run whole, or why it cannot."""
        if not self._reads_used:
            return f"attention {self._config._attn_implementation!r} is the model's own"
        return attention_weights(block, weights, getattr(architecture.stack, "rotary_emb", None), self.batch)

    def _on_device(self) -> AbstractContextManager[None]:
        """Inside, launches go to the model's GPU, whichever is the current one."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _key(self) -> _Key:
        """What a captured graph is good for: a window, the place of the storage, positions, padding."""
        return (self._window(), self.cache.version, self._tabled, self._padded)

    def _window(self) -> int:
        if self._reads_used:  # the op finds out by itself how much is there
            return self.cache.slots
        window = MIN_WINDOW
        while window <= self.cache.get_seq_length():
            window *= 2
        return min(window, self.cache.slots)

    def _compute(self) -> Tensor:
        """The step itself, all of which can be captured: logits [batch, vocabulary], in place."""
        inputs, window = self.inputs, self._window()
        self._rule.start()
        valid = inputs.valid_static[:, :window] if self._padded else None
        patches = InstancePatches()
        self.cache.enter_step(inputs.place_static, window)
        try:
            for ffn in self._ffns:
                ffn.set_on(patches)
            if self._outside is not None:
                self._outside.set_on(patches, tabled=self._tabled)
            with self._attention(inputs.place_static[0] + 1, valid):
                mask = None if self._fused else self._mask(self._seen(window, valid))
                logits = self._logits(inputs.ids_static, inputs.positions_static, mask, self.cache)
        except BaseException:
            for ffn in self._ffns:
                ffn.abandon()
            raise
        finally:
            patches.restore()
            self.cache.leave_step()
        self._counts.add_no_sync(self._skips, inputs)
        if not hasattr(self, "_logits_static"):
            self._logits_static = torch.empty_like(logits)
        return self._logits_static.copy_(logits)

    def _attention(self, length: Tensor, valid: Tensor | None) -> AbstractContextManager[None]:
        self._sight.length, self._sight.valid = length, valid
        return step_attention(self._config, self._sight) if self._reads_used else nullcontext()

    def _seen(self, window: int, valid: Tensor | None) -> Tensor:
        """[batch, window] bool: places that attention may see."""
        seen = (self._places[:window] <= self.inputs.place_static).expand(self.batch, -1)
        return seen if valid is None else seen & valid

    def _mask(self, seen: Tensor) -> Tensor:
        """[batch, 1, 1, window], as the attention wants it."""
        mask = seen[:, None, None]
        if self._reads_used:
            return mask
        zeros = torch.zeros(mask.shape, dtype=self.dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(self.dtype).min)

    def _capture(self) -> None:
        """Record the step for the present window."""
        # A full step: it skips nothing, so that all that may run has run, and counts nothing. What it
        # writes to the cache is overwritten by the step that is to come.
        self.inputs.place_static.fill_(self.cache.get_seq_length())
        self.inputs.active_static.fill_(False)
        bodies = prepare_if_nodes() if any(isinstance(ffn, ModuleFFN) for ffn in self._ffns) else None
        stream = _capture_stream(self.device)
        for warm in [stream] * _WARM_UPS + ([] if bodies is None else [bodies]):
            warm.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm):
                self._compute()
            torch.cuda.current_stream().wait_stream(warm)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # Graphs of one step never run at the same time and copy their results out: one pool will do.
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        with (
            torch.cuda.stream(torch.cuda.current_stream()),  # which a capture that fails does not put back
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            self._compute()
        self._graphs = {key: g for key, g in self._graphs.items() if key[1] == self.cache.version}
        self._graphs[self._key()] = graph


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream of a GPU for all captures: torch hands out a limited number in turn."""
    return torch.cuda.Stream(device)
