"""Decode passes that one CUDA graph holds whole: who skips is decided on the device. Not run on a GPU yet.

A graph replays launches and no Python. So what a pass is over lies in buffers that stay in place, and is
written there before each replay: to which rows a rule applies and by which threshold; what fixed sets skip,
which is known beforehand; and which rows only pad the pass, for those make no op read a weight. The FFNs in a
graph are skipcal's ops, which read their weights if some row needs them. What was skipped is summed up on the
device, and fetched when somebody asks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipcal.core.chosen_ffns import ChoiceRule
from skipcal.core.cosine import CosineRule
from skipcal.core.gate import GateRule
from skipcal.core.rule import Rule
from skipcal.ops.ffn import MAX_ROWS, FFNWeights, ffn
from skipcal.ops.rules import FusedCosine, FusedGate, Unasked, limit_of
from skipcal.ops.stand_in import add_surrogate
from skipcal.serving.blocks import ServedBlock
from skipcal.serving.clock import BatchTokens, Bools
from skipcal.serving.counts import RequestReport
from skipcal.serving.plain_ffn import plain_weights
from skipcal.serving.targets import KEPT, RequestRule

SLOTS = 1024  # requests whose skips are summed up on the device before they have to be fetched
_NOBODYS = -1


def capturing(x: Tensor) -> bool:
    """Whether what is launched on x now becomes part of a graph.

    Pieces of a pass are captured without their FFNs, so it is a graph of a whole pass.
    """
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class CapturedPasses:
    """The FFNs of passes that are captured whole, over up to MAX_ROWS rows."""

    @torch.inference_mode(False)  # buffers are written inside of it and outside
    def __init__(
        self, blocks: Sequence[ServedBlock], own: RequestRule, weights: Mapping[int, FFNWeights]
    ) -> None:
        """own: the rule of requests that say nothing; weights: of all layers that a request may skip."""
        device = blocks[0].place[0]
        self._layers, self._own, self._weights = len(blocks), own, weights
        # Flags: by layer, then of a layer that nobody has, then whether a rule applies.
        self._said_static = torch.full(
            (self._layers + 2, MAX_ROWS), _NOBODYS, dtype=torch.int8, device=device
        )
        self._skips, self._active = self._said_static[:-1], self._said_static[-1]
        # By row: threshold, bit by bit; the most skips; slot of its request.
        self._values_static = torch.zeros(3, MAX_ROWS, dtype=torch.int32, device=device)
        self._rule = self._on_device(own.rule)
        self._captured: dict[int, set[int]] = {}  # by rows of a graph: layers whose FFN it holds
        # By slot, the last of which is nobody's, and layer: FFNs skipped.
        self._sums = torch.zeros(SLOTS + 1, self._layers, dtype=torch.int32, device=device)
        self._unread = torch.zeros(self._layers, dtype=torch.long, device=device)
        self._slots: dict[str, int] = {}  # by request that has not ended
        self._taken = 0  # slots, of requests that have ended, too
        self._reports: dict[int, RequestReport] = {}  # by slot
        self.fits = functools.lru_cache(KEPT)(self._fits)
        self._row_of = functools.lru_cache(KEPT)(_row_of)

    def _on_device(self, rule: Rule) -> FusedGate | FusedCosine | Unasked:
        threshold, limit = self._values_static[0].view(torch.float32), self._values_static[1]
        if isinstance(rule, GateRule):
            return FusedGate(rule, active=self._active, skips=self._skips, threshold=threshold)
        if isinstance(rule, CosineRule):
            live = torch.ones(MAX_ROWS, dtype=torch.bool, device=self._active.device)
            return FusedCosine(
                rule, active=self._active, live=live, skips=self._skips, threshold=threshold, limit=limit
            )
        return Unasked(self._skips)

    def holds(self, rows: int) -> bool:
        """Whether a graph over so many rows decides on every FFN."""
        return len(self._captured.get(rows, ())) == self._layers

    def _fits(self, judged: RequestRule) -> bool:
        """Whether rows may be judged so: graphs hold probes, region and maps of the engine's own rule."""
        rule, own = judged.rule, self._own.rule
        if judged.surrogates is not self._own.surrogates or not self._weights.keys() >= {*rule.layers}:
            return False
        if isinstance(rule, GateRule):
            return isinstance(own, GateRule) and rule.gates is own.gates
        if isinstance(rule, CosineRule):
            return isinstance(own, CosineRule) and rule.layers == own.layers
        return isinstance(own, ChoiceRule) and isinstance(rule, ChoiceRule) and rule.always

    # In a graph

    def ffn_no_sync(self, layer: int, x: Tensor, h: Tensor) -> Tensor | None:
        """What a block adds to the stream h, with x its norm, [rows, hidden]; None: what its own FFN does."""
        rows = len(x)
        if rows > MAX_ROWS:
            return None
        self._captured.setdefault(rows, set()).add(layer)
        rule = self._rule.over(rows)
        if layer == 0:
            rule.start()
        weights = self._weights.get(layer)
        if weights is None:
            return None
        decides = layer in self._own.rule.layers
        skip = rule.before(layer, h) if decides else self._skips[layer, :rows]
        f, sums = ffn(h, skip, weights, x=x)
        if decides:
            rule.after(layer, h, f, sums)
        add_surrogate(self._own.surrogates, layer, h, skip, onto=f)
        return f

    @torch.no_grad()
    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run what graphs over so many rows will hold: nothing can be compiled while one is captured."""
        for rows in sizes if self._weights else ():
            some = next(iter(self._weights.values())).gate
            x = some.new_zeros(rows, some.shape[1])
            for layer in range(self._layers):
                self.ffn_no_sync(layer, x, x)
        self._captured.clear()

    # Before a replay, and after it

    def say_no_sync(self, tokens: BatchTokens, ruled: Bools, rules: Sequence[RequestRule]) -> None:
        """Write what the pass to come is over.

        ruled: tokens to which a rule applies, [tokens]; rules: of each request, [requests].
        """
        count, owner = len(ruled), tokens.owner
        said = np.full(self._said_static.shape, _NOBODYS, dtype=np.int8)
        said[:, :count] = 0
        said[-1, :count] = ruled
        each = [self._row_of(judged) for judged in rules]
        for row in np.flatnonzero(ruled):
            said[each[owner[row]].skipped, row] = 1
        values = np.full(self._values_static.shape, SLOTS, dtype=np.int32)
        values[0, :count] = np.array([row.threshold for row in each], dtype=np.float32)[owner].view(np.int32)
        values[1, :count] = np.array([row.limit for row in each])[owner]
        slots = np.array([self._slot_of(name) for name in tokens.requests])[owner]
        values[2, :count] = np.where(tokens.counted & ruled, slots, SLOTS)
        _write_no_sync(self._said_static, said)
        _write_no_sync(self._values_static, values)

    def say_full_no_sync(self) -> None:
        """The pass to come is the full model's."""
        self._said_static.zero_()

    def count_no_sync(self, tokens: BatchTokens, each: Sequence[RequestReport]) -> None:
        """Sum up what the last replay has skipped; each: where it belongs, [requests]."""
        skips = self._skips[:-1]
        self._sums.index_add_(0, self._values_static[2], (skips > 0).T.to(torch.int32))
        self._unread += (skips != 0).all(1)
        self._reports.update(
            (self._slots[name], report) for name, report in zip(tokens.requests, each, strict=True)
        )

    def room_for(self, tokens: BatchTokens) -> bool:
        """Whether the sums have slots for the requests of a pass."""
        return self._taken + len(tokens.requests) <= SLOTS

    def forget(self, ended: Sequence[str]) -> None:
        """Their names may be used again; what they have skipped stays until it is fetched."""
        for name in ended:
            self._slots.pop(name, None)

    def _slot_of(self, name: str) -> int:
        if name not in self._slots:
            self._slots[name] = self._taken
            self._taken += 1
        return self._slots[name]

    def fetch(self) -> tuple[list[tuple[RequestReport, list[int]]], list[int]]:
        """What requests have skipped by layer, and FFNs that passes left unread, since the last time."""
        if not self._taken:
            return [], [0] * self._layers
        sums, unread = self._sums.tolist(), self._unread.tolist()
        found = [(report, sums[slot]) for slot, report in self._reports.items()]
        self._sums.zero_()
        self._unread.zero_()
        self._slots.clear()
        self._reports.clear()
        self._taken = 0
        return found, unread


class _Row:
    """What is said of a row under a rule: threshold, the most skips, layers that it skips in any case."""

    def __init__(self, rule: Any) -> None:
        self.threshold = float(getattr(rule, "threshold", 0.0))
        self.limit = limit_of(rule) if isinstance(rule, CosineRule) else 0
        self.skipped = sorted(rule.layers) if isinstance(rule, ChoiceRule) else []


def _row_of(judged: RequestRule) -> _Row:
    return _Row(judged.rule)


def _write_no_sync(static: Tensor, said: Any) -> None:
    found = torch.from_numpy(said)
    if static.is_cuda:
        found = found.pin_memory()  # the copy is made later, and the allocator keeps the memory until then
    static.copy_(found, non_blocking=True)


def captured_passes(
    blocks: Sequence[ServedBlock], own: RequestRule, *, other_targets: bool
) -> CapturedPasses | str:
    """What graphs of whole passes will hold, or why the model or the rule cannot be in one.

    other_targets: requests may ask for other ones than `own`'s, by which other layers may be skipped.
    """
    rule = own.rule
    if not isinstance(rule, GateRule | CosineRule | ChoiceRule):
        return f"{own.method} is not decided on the device"
    if isinstance(rule, ChoiceRule) and not rule.always:
        return f"{own.method} draws at random"
    any_layer = isinstance(rule, ChoiceRule) and other_targets
    found = {b.index: plain_weights(b) for b in blocks if any_layer or b.index in rule.layers}
    for layer, weights in found.items():
        if isinstance(weights, str):
            return f"layer {layer}: {weights}"
    return CapturedPasses(blocks, own, {n: w for n, w in found.items() if isinstance(w, FFNWeights)})
