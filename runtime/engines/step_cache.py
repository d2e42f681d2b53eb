"""A key-value cache that stays in place, so that a captured decode step can write to it.

Outside captured steps it is an ordinary cache that grows, and attention is given exactly the
tokens that are there. In a captured step the place of the new token is read on the device, and
attention is given a window: the first `window` places, a number fixed at the capture. A power of
two that just holds the text makes long contexts cost what they hold, not what the cache could hold.

Of the steps that a session keeps one runs at a time. Their caches have their memory by turns, from the
beginning of a call to its end, so that all of them take what the largest has needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from skipcal.ops.lang import padded

# Slots of a cache are a power of two, at least the first number; where a call may need more than the second,
# a multiple of that. Few numbers, for each is a capture, and little of a large cache is left empty.
_LEAST, _UNIT = 256, 1024


class Memory:
    """Memory for a layer's keys, or values, of one cache at a time. version: changes when it moves."""

    def __init__(self) -> None:
        """None is taken yet."""
        self.version = 0
        self._flat: Tensor | None = None

    def take(self, like: Tensor, slots: int) -> Tensor:
        """[batch, heads, slots, head_dim] of the kind of `like`, [batch, heads, any, head_dim].

        In it is what another cache has left there, whose own memory it may be.
        """
        shape = (*like.shape[:2], slots, like.shape[3])
        size, flat = math.prod(shape), self._flat
        if flat is None or flat.numel() < size or (flat.dtype, flat.device) != (like.dtype, like.device):
            self._flat = flat = None  # this goes first, unless a cache is in it
            with torch.inference_mode(False):  # whose tensors are of no use outside
                self._flat = flat = torch.empty(size, dtype=like.dtype, device=like.device)
            self.version += 1
        return flat[:size].view(shape)

    def free(self) -> None:
        """Let go of it."""
        self._flat = None


Memories = Sequence[tuple[Memory, Memory]]  # for keys and values, by layer


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer, each [batch, kv_heads, slots, head_dim]."""

    is_sliding = False

    def __init__(self, slots: int, most: int, memory: tuple[Memory, Memory] | None = None) -> None:
        """Room for `slots` tokens; up to `most` are given room when they come, outside captured steps.

        memory: for keys and values; None: its own.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.most = slots, most
        self._memory = memory or (Memory(), Memory())
        self.length = 0
        self.place_static: Tensor | None = None  # [1] int64, set while a step runs
        self.window = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the storage."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._take(self.slots, key_states[:, :, :0], value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, seq, head_dim] and return what attention may see."""
        if self.place_static is not None:
            assert self.keys is not None and self.values is not None
            self.keys.index_copy_(2, self.place_static, key_states)
            self.values.index_copy_(2, self.place_static, value_states)
            return self.keys[:, :, : self.window], self.values[:, :, : self.window]
        end = self.length + key_states.shape[2]
        self.make_room(end)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns for `query_length` tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens in the cache."""
        return self.length

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1

    @property
    def version(self) -> int:
        """Changes when the storage moves."""
        return self._memory[0].version

    def reset(self) -> None:
        """Forget the tokens, and let go of the storage."""
        self.length, self.keys, self.values, self.is_initialized = 0, None, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx`, in place."""
        if self.keys is not None and self.values is not None:
            for t in (self.keys, self.values):
                t.copy_(t.index_select(0, beam_idx.to(t.device)))

    def make_room(self, tokens: int) -> None:
        """Have room for `tokens`; where there is none, in new storage: steps captured before are void."""
        if tokens <= self.slots:
            return
        if tokens > self.most:
            raise ValueError(f"{tokens} tokens do not fit a cache that was made for {self.most} at most")
        slots = min(padded(tokens), self.most)
        if self.keys is None or self.values is None:
            self.slots = slots
        else:  # copied, for the new storage may lie in the old one
            self._take(slots, *(t[:, :, : self.length].clone() for t in (self.keys, self.values)))

    def _take(self, slots: int, keys: Tensor, values: Tensor) -> None:
        """Have storage with these tokens in it. What raises, as when memory runs out, changes nothing."""
        given = (keys, values)
        stored = [memory.take(t, slots) for memory, t in zip(self._memory, given, strict=True)]
        for place, t in zip(stored, given, strict=True):
            place[:, :, : t.shape[2]] = t
            place[:, :, t.shape[2] :] = 0  # what is masked is multiplied by 0, and must not be NaN
        self.slots, (self.keys, self.values) = slots, stored

    def as_made_by_transformers(self) -> DynamicLayer:
        """A layer with these tokens, which can be cut, looked at and gone on from like any other."""
        layer = DynamicLayer()
        if self.is_initialized and self.keys is not None and self.values is not None:
            layer.lazy_initialization(self.keys, self.values)
            layer.keys, layer.values = (t[:, :, : self.length].clone() for t in (self.keys, self.values))
        return layer


class StepCache(Cache):
    """A StepLayer for each layer of the model."""

    layers: list[StepLayer]  # type: ignore[assignment]

    def __init__(self, memories: Memories, slots: int) -> None:
        """Of so many layers. slots: at most so many, a power of two, before there are tokens."""
        super().__init__(layers=[StepLayer(0, 0, memory) for memory in memories])
        self._first = slots

    def begin(self, tokens: int) -> None:
        """Be empty, for a text of at most `tokens` tokens. Of a longer text before it the slots remain."""
        most = _UNIT * -(-tokens // _UNIT)
        first = min(max(padded(tokens), _LEAST), self._first)
        for layer in self.layers:
            layer.reset()
            layer.slots = max(layer.slots, first)
            layer.most = max(layer.slots, most)

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.layers[0].slots

    @property
    def version(self) -> tuple[int, int]:
        """Changes when the storage moves, or is cut otherwise: a captured step is good for one only."""
        return self.layers[0].version, self.slots

    def make_room(self) -> None:
        """Have a place for one token more of each row."""
        tokens = self.layers[0].length + 1
        if tokens > self.slots:  # asked before each token
            for layer in self.layers:
                layer.make_room(tokens)

    def enter_step(self, place: Tensor, window: int) -> None:
        """From here on `update` writes one token at `place` [1] and returns `window` places."""
        for layer in self.layers:
            layer.place_static, layer.window = place, window

    def leave_step(self) -> None:
        """Be an ordinary cache again."""
        for layer in self.layers:
            layer.place_static = None

    def clear(self) -> None:
        """Forget all tokens, and let go of the storage."""
        for layer in self.layers:
            layer.reset()

    def hand_out(self) -> StepCache:
        """Be a cache as transformers makes them, for good: each layer's tokens, copied, and no room besides.

        Returns a cache of the layers as they were, for steps that write to them.
        """
        kept = copy(self)
        self.layers = [layer.as_made_by_transformers() for layer in self.layers]  # type: ignore[misc]
        return kept

    def rewind(self, tokens: int) -> None:
        """Forget the last tokens, and clear their places: a step that writes elsewhere must not find them."""
        for layer in self.layers:
            layer.length -= tokens
            if layer.keys is not None and layer.values is not None:
                for stored in (layer.keys, layer.values):
                    stored[:, :, layer.length : layer.length + tokens].zero_()

    def advance(self) -> None:
        """One token more is there."""
        for layer in self.layers:
            layer.length += 1
