"""A key-value cache that stays in place, so that a captured decode step can write to it.

Outside captured steps it is an ordinary cache that grows, and attention is given exactly the
tokens that are there. In a captured step the place of the new token is read on the device, and
attention is given a window: the first `window` places, a number fixed at the capture. A power of
two that just holds the text makes long contexts cost what they hold, not what the cache could hold.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer


class StepLayer(CacheLayerMixin):
    """Keys and values of one layer, each [batch, kv_heads, slots, head_dim]."""

    is_sliding = False

    def __init__(self, slots: int, most: int) -> None:
        """Room for `slots` tokens; up to `most` are given room when they come, outside captured steps."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots, self.most = slots, most
        self.version = 0  # of the storage
        self.length = 0
        self.place_static: Tensor | None = None  # [1] int64, set while a step runs
        self.window = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take the storage: zeros, for what is masked is multiplied by 0 and must not be NaN."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (
            torch.zeros(*t.shape[:2], self.slots, t.shape[3], dtype=t.dtype, device=t.device)
            for t in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [batch, kv_heads, seq, head_dim] and return what attention may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        if self.place_static is not None:
            self.keys.index_copy_(2, self.place_static, key_states)
            self.values.index_copy_(2, self.place_static, value_states)
            return self.keys[:, :, : self.window], self.values[:, :, : self.window]
        end = self.length + key_states.shape[2]
        self.make_room(end)
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

    def reset(self) -> None:
        """Forget the tokens; the storage stays."""
        self.length = 0

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
        slots = min(max(tokens, 2 * self.slots), self.most)
        assert self.keys is not None and self.values is not None
        more = slots - self.slots
        self.version += 1
        self.keys, self.values = (
            torch.cat([t, t.new_zeros(*t.shape[:2], more, t.shape[3])], dim=2)
            for t in (self.keys, self.values)
        )
        self.slots = slots

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

    def __init__(self, num_layers: int, slots: int, *, most: int) -> None:
        """Room for `slots` tokens of each row at first, for `most` in the end."""
        super().__init__(layers=[StepLayer(slots, most) for _ in range(num_layers)])

    @property
    def slots(self) -> int:
        """Tokens there is room for."""
        return self.layers[0].slots

    @property
    def version(self) -> int:
        """Changes when the storage moves: a captured step is good for one version only."""
        return self.layers[0].version

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
        """Forget all tokens; the storage stays."""
        for layer in self.layers:
            layer.reset()

    def hand_out(self) -> None:
        """Be a cache as transformers makes them, for good: each layer's tokens, and no room besides."""
        self.layers = [layer.as_made_by_transformers() for layer in self.layers]  # type: ignore[misc]

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
