"""One decode step of a batch on a CPU as a list of torch calls.

Two things in a step are not the same each time, and stay calls of what they are. The modules of the
FFN blocks that the engine watches decide anew for each token; what such a module computes where it runs is a
list of its own. Attention writes to a cache that grows and reads all of it; the cache that the
recorded forward is given only notes which layer is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipcal.arch.locate import Architecture, Block
from skipcal.arch.patch import InstancePatches
from skipcal.core.host import FULL_PASS, PassTokens
from skipcal.runtime.engines.eager import EagerEngine
from skipcal.runtime.engines.prepared_step import PreparedStep
from skipcal.runtime.engines.recording import Branch, NotRecordable, Recording, leaf, record
from skipcal.runtime.engines.step_cache import Memories, StepCache, StepLayer
from skipcal.runtime.engines.step_proof import Deviation, logits_deviation

FIRST_SLOTS = 256  # of a cache, which grows with its text
_NAME = "skipcal_recorded"
_LIMIT = 5e-3  # of the logits: torch may order sums in another way where memory lies otherwise
_MOST_GROUPED = 256  # head size up to which transformers leaves groups of queries to torch


class RecordedStep(PreparedStep):
    """One decode step of `batch` rows, however long."""

    def __init__(
        self,
        forward: Callable[..., Any],
        architecture: Architecture,
        memories: Memories,
        eager: EagerEngine,
        *,
        batch: int,
    ) -> None:
        """forward: the causal language model's. eager: attached, its modules decide."""
        super().__init__(forward, architecture, memories, batch=batch, room=sys.maxsize, slots=FIRST_SLOTS)
        self._eager = eager
        self._mask: Tensor | None = None  # [batch, 1, 1, tokens] bool, with padding
        self._padded = False
        self._recording: Recording | None = None
        self._inside = {module: _OwnList(forward) for module, forward in eager.forwards.items()}
        self._blocks = architecture.blocks

    def settle(self, given: dict[str, Any]) -> None:
        """Take the padding of `given`, the arguments of the model's forward."""
        mask: Tensor | None = given.get("attention_mask")
        if self.fresh:
            self._padded, self.fresh = mask is not None and not bool(mask.all()), False
        self._mask = mask.bool()[:, None, None] if mask is not None and self._padded else None
        self.cache.make_room()

    @property
    def is_made(self) -> bool:
        """Whether the step is recorded."""
        return self._recording is not None

    def make(self, given: dict[str, Any]) -> None:
        """Record."""
        self._recording = self._record(given["input_ids"], self._positions(given.get("position_ids")))
        calls, watched = self._recording.calls, len(self._eager.blocks)
        self.how = f"a step is {calls} torch calls, with {watched} FFNs asked in between"

    def deviations(self, given: dict[str, Any]) -> list[Deviation]:
        """Of the logits, which are the model's bit for bit: the calls are its own."""
        own = self._model_logits(given)
        mine = self.run_no_sync(given["input_ids"], given.get("position_ids"), FULL_PASS)
        self.cache.rewind(1)
        return [logits_deviation("the result of a step", mine, own, _LIMIT)]

    def run_no_sync(self, ids: Tensor, positions: Tensor | None, tokens: PassTokens) -> Tensor:
        """Logits [batch, vocabulary] of the next token."""
        assert self._recording is not None
        self._eager.begin(tokens)
        self._eager.instead = self._inside
        try:
            with self._written():
                logits: Tensor = self._recording.repeat(ids, self._positions(positions))
        finally:
            self._eager.instead = {}
        self.cache.advance()
        return logits

    @contextmanager
    def _written(self) -> Iterator[None]:
        """Inside, layers of the cache write one token after those that are there, and return all."""
        length = self.cache.get_seq_length()
        self.cache.enter_step(torch.tensor([length]), length + 1)
        try:
            yield
        finally:
            self.cache.leave_step()

    def _positions(self, positions: Tensor | None) -> Tensor:
        if positions is None:
            return torch.full((self.batch, 1), self.cache.get_seq_length())
        return positions.expand(self.batch, 1)

    def _record(self, ids: Tensor, positions: Tensor) -> Recording:
        try:
            return self._record_around(self._eager.blocks, ids, positions)
        except NotRecordable:  # perhaps a mixture of experts in a layer that is never skipped
            return self._record_around(self._blocks, ids, positions)

    def _record_around(self, blocks: Iterable[Block], ids: Tensor, positions: Tensor) -> Recording:
        """The step as a list in which the modules of `blocks` are called as they are."""
        noted = _NotingCache(self.cache)
        # One place, so that no model makes a mask; what is seen is known to the attention below.
        mask = torch.ones(self.batch, 1, 1, 1, dtype=torch.bool)

        def step(ids: Tensor, positions: Tensor) -> Tensor:
            return self._logits(ids, positions, mask, noted)

        patches = InstancePatches()
        ALL_ATTENTION_FUNCTIONS[_NAME] = self._attend(noted)
        try:
            patches.set(self._config, "_attn_implementation_internal", _NAME)
            branches = []
            for block in blocks:
                handed = _HandedOn()
                # Of several rows a chain's modules are given those that run, however many these are.
                leaves = [m.forward if self.batch == 1 else handed.to(m.forward) for m in block.chain]
                for module, forward in zip(block.chain, leaves, strict=True):
                    patches.set(module, "forward", leaf(forward))
                if self.batch == 1 and block.scale == 1.0 and block in self._eager.blocks:
                    whole = self._eager.whole_block(block, _OwnList(_one_after_another(self._eager, block)))
                    branches.append(Branch(leaves, whole))
            with self._written():
                return record(step, ids, positions, branches=branches)
        finally:
            patches.restore()
            del ALL_ATTENTION_FUNCTIONS[_NAME]

    def _attend(self, noted: _NotingCache) -> Callable[..., Any]:
        """What stands for torch's attention in a recorded forward: the layer's cache, then that attention."""
        torch_attention: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, **options: Any) -> Any:
            layer = noted.layer_of(key, value)
            several = query.shape[1] != key.shape[1]  # queries to a key
            plain = _is_plain(options) and key.shape[-1] == value.shape[-1] <= _MOST_GROUPED
            scale = options.get("scaling")

            @leaf
            def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                keys, values = layer.update(key, value)
                if plain and self._mask is None:  # what transformers comes to, without asking again
                    out = F.scaled_dot_product_attention(query, keys, values, scale=scale, enable_gqa=several)
                    return out.transpose(1, 2).contiguous()
                found: Tensor = torch_attention(module, query, keys, values, self._mask, **options)[0]
                return found

            return attention(query, key, value), None

        return attend


def _is_plain(options: dict[str, Any]) -> bool:
    """Whether attention is a softmax of products and nothing else."""
    known = ("scaling", "dropout", "sliding_window", "is_causal", "position_ids", "use_cache")
    return not options.get("dropout") and all(
        v in (None, False) for k, v in options.items() if k not in known
    )


def _one_after_another(eager: EagerEngine, block: Block) -> Callable[[Tensor], Any]:
    """The block's modules as one function, by their own forward."""
    forwards = [eager.forwards[module] for module in block.chain]

    def f_of(h: Tensor) -> Any:
        for forward in forwards:
            h = forward(h)
        return h

    return f_of


class _HandedOn:
    """Sees that the modules of a chain hand their results to each other, with nothing in between."""

    def __init__(self) -> None:
        self._modules = 0
        self._last: Any = None

    def to(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The next module's forward."""
        first = self._modules == 0
        self._modules += 1

        def checked(*args: Any, **kwargs: Any) -> Any:
            given = (*args, *kwargs.values())[0]
            if not first and given is not self._last:
                raise NotRecordable(
                    "a layer changes what its FFN's modules hand on, and rows may be left out"
                )
            self._last = forward(*args, **kwargs)
            return self._last

        return checked


class _OwnList:
    """What a module computes for one token, as a list of calls; for other inputs its own forward."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        """Record when it first runs."""
        self._forward = self._repeat = forward
        self._shape: torch.Size | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module's forward."""
        if kwargs or len(args) != 1:
            return self._forward(*args, **kwargs)
        (x,) = args
        if self._shape is None:
            self._shape = x.shape
            with suppress(NotRecordable):
                self._repeat = record(self._forward, x).repeat
        return self._repeat(x) if x.shape == self._shape else self._forward(x)


class _NotingCache(Cache):
    """Keeps nothing: hands back what it is given, and knows whose it was."""

    def __init__(self, cache: StepCache) -> None:
        self._noting = [_NotingLayer(layer) for layer in cache.layers]
        super().__init__(layers=list(self._noting))

    def layer_of(self, key: Tensor, value: Tensor) -> StepLayer:
        """The layer of the cache to which these very keys and values belong."""
        for noting in self._noting:
            if noting.given is not None and noting.given[0] is key and noting.given[1] is value:
                noting.given = None
                return noting.layer
        raise NotRecordable("attention is given other keys and values than the cache")


class _NotingLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, layer: StepLayer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.given: tuple[Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """There is nothing to initialise."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note these, and hand them back."""
        self.given = (key_states, value_states)
        return self.given

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if there were nothing but the new token."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Tokens before this one."""
        return self.layer.get_seq_length()

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1
