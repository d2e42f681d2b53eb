"""Bytes that a decode step reads, and what follows from them: arithmetic, no measurement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from skipcal.arch.locate import Architecture
from skipcal.arch.stored import stored_bytes
from skipcal.errors import TargetOutOfReach


@dataclass(frozen=True)
class StepBytes:
    """What one decode step of the full model reads.

    weights:  every weight once, whatever the batch; the input embedding only where it is the LM head too.
    kv_cache: keys and values of all rows and layers, on average over the steps.
    """

    weights: int
    kv_cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.kv_cache

    def ideal_speed_up(self, saved: float) -> float:
        """Speed over the full model's if time were bytes and nothing else, with `saved` bytes not read."""
        return self.total / (self.total - saved)


@dataclass(frozen=True)
class ForcedRatio:
    """A skip ratio as a mean of whole numbers of skipped FFN blocks.

    counts: of skipped blocks and the share of steps with that count; the shares sum to 1.
    """

    ratio: float
    counts: tuple[tuple[int, float], ...]

    @property
    def skips(self) -> float:
        """Skipped blocks a token, on average."""
        return sum(count * share for count, share in self.counts)


def forced_ratio(ratio: float, num_layers: int, *, most: int, limit: str) -> ForcedRatio:
    """The whole numbers of skipped blocks on either side of `ratio`, and their shares.

    Raises TargetOutOfReach for more than `most` skipped blocks; `limit` says why there are no more.
    """
    if not 0 < ratio * num_layers <= most + 1e-9:
        raise TargetOutOfReach(
            f"skip ratio {ratio:g} is out of reach: {limit}; give --ratios above 0, up to "
            f"{most / num_layers:.3f}"
        )
    skips = ratio * num_layers
    low = math.floor(skips + 1e-9)
    above = skips - low
    if above < 1e-9:
        return ForcedRatio(ratio, ((low, 1.0),))
    return ForcedRatio(ratio, ((low, 1.0 - above), (low + 1, above)))


def step_bytes(model: Any, architecture: Architecture, *, batch_size: int, tokens: float) -> StepBytes:
    """What a decode step reads of a model with `tokens` tokens of every row in its cache.

    A sliding window bounds what a layer reads.
    """
    layers = sum(block.layer_bytes for block in architecture.blocks)
    inside = {id(p) for block in architecture.blocks for p in block.layer.parameters()}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    unread = set() if head is not None and head.weight is embedding else {id(embedding)}
    outside = sum(stored_bytes(p) for p in model.parameters() if id(p) not in inside and id(p) not in unread)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    per_token = 2 * heads * width * model.dtype.itemsize
    held = sum(min(tokens, window or tokens) for window in _windows(config, architecture.num_layers))
    return StepBytes(
        weights=layers + outside,
        kv_cache=round(batch_size * per_token * held),
    )


def break_even(points: Sequence[tuple[float, float]]) -> tuple[float | None, str]:
    """Skip ratio at which skipping is as fast as the full model, and how that was found.

    points: (skip ratio, speed-up), the first at ratio 0: watching without skipping. Between them
            the speed-up is taken to be linear. None where it does not cross 1.
    """
    ordered = sorted(points)
    if all(speed_up < 1 for _, speed_up in ordered):
        return None, f"slower than the full model at every ratio up to {ordered[-1][0]:g}"
    if all(speed_up >= 1 for _, speed_up in ordered):
        return None, "never slower than the full model, even where nothing is skipped"
    # The last crossing: from there on skipping pays, as far as it was measured.
    place = max(i for i, (_, speed_up) in enumerate(ordered) if speed_up < 1)
    if place == len(ordered) - 1:
        return None, f"slower than the full model at {ordered[-1][0]:g}, though faster at a smaller ratio"
    (low, below), (high, above) = ordered[place : place + 2]
    ratio = low + (high - low) * (1 - below) / (above - below)
    return ratio, f"interpolated between {low:g} and {high:g}"


def _windows(config: Any, num_layers: int) -> list[int | None]:
    """Attention window of each layer; None: the whole context."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * num_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]
