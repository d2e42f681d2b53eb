"""A naive decoder for any architecture: one row, one token a pass, the FFN's output overwritten by zeros.

It knows of a layer only which module's output the layer adds last (`Oddity.adds`), and takes h as what
the layer returns less that: no hook on what h is, no table of families, no gathering of tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from skipcal.core.policy import SkipPolicy


@dataclass(frozen=True)
class Oddity:
    """What is not as in Llama. adds: the modules whose outputs a layer adds; into: who is given the sum."""

    layers: str = "model.layers"
    adds: tuple[str, ...] = ("mlp",)
    scale: float = 1.0
    into: str | None = None


def first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


class ByHand:
    """Watches every layer of a pass; where `rule` is set it skips by it, for the last token of one row."""

    def __init__(self, model: Any, oddity: Oddity) -> None:
        self.layers = list(attrgetter(oddity.layers)(model))
        self.oddity = oddity
        self.rule: SkipPolicy | None = None
        self.streams: list[tuple[Tensor, Tensor]] = []  # of each layer: h + f and f, in float64
        self.skipped: list[int] = []
        self.cosines: list[float] = []

    def start(self) -> None:
        self.streams, self.skipped, self.cosines = [], [], []
        self.armed, self.now_skipping = False, False
        self.f: Tensor | None = None

    def _added(self, module: str) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            y = first(output)
            if self.now_skipping:
                zeros = torch.zeros_like(y)
                return (zeros, *output[1:]) if isinstance(output, tuple) else zeros
            part = y.detach().clone().double() * self.oddity.scale
            self.f = part if self.f is None else self.f + part
            return None

        return hook

    def _entered(self, index: int) -> Any:
        def hook(*_: Any) -> None:
            self.f = None
            rule = self.rule
            used_up = rule is not None and rule.max_skips is not None and len(self.skipped) >= rule.max_skips
            inside = rule is not None and rule.cold_s <= index < rule.cold_e
            self.now_skipping = inside and self.armed and not used_up

        return hook

    def _summed(self, index: int) -> Any:
        def hook(_module: Any, args: Any, output: Any = None) -> None:
            total = first(output if output is not None else args).detach().clone().double()
            if self.now_skipping:
                self.skipped.append(index)
                return
            assert self.f is not None
            f = self.f.reshape(total.shape)
            self.streams.append((total, f))
            value = float(cosines(total, f).reshape(-1)[-1])
            rule = self.rule
            if rule is not None and rule.cold_s <= index < rule.cold_e:
                self.cosines.append(value)
                self.armed = self.armed or value >= rule.threshold

        return hook

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for index, layer in enumerate(self.layers):
            handles.append(layer.register_forward_pre_hook(self._entered(index)))
            for name in self.oddity.adds:
                handles.append(attrgetter(name)(layer).register_forward_hook(self._added(name)))
            if self.oddity.into:
                given = attrgetter(self.oddity.into)(layer)
                handles.append(given.register_forward_pre_hook(self._summed(index)))
            else:
                handles.append(layer.register_forward_hook(self._summed(index)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def cosines(total: Tensor, f: Tensor) -> Tensor:
    """cos(h, h + f) with h = total - f, in float64: [..., hidden] -> [...]."""
    return torch.nn.functional.cosine_similarity(total - f, total, dim=-1)


@dataclass
class Decoded:
    """Of one row: tokens, and of each decode step the logits, the layers skipped and the cosines seen."""

    tokens: list[int]
    logits: list[Tensor]
    skipped: list[list[int]]
    cosines: list[float]


def decode(model: Any, oddity: Oddity, prompt: list[int], new_tokens: int, policy: SkipPolicy) -> Decoded:
    """Greedy decoding with a cache, step by step."""
    hand = ByHand(model, oddity)
    positions = "position_ids" in inspect.signature(model.forward).parameters
    result = Decoded([], [], [], [])
    with hand.watching():
        hand.start()
        out = model(torch.tensor([prompt]), use_cache=True)
        for step in range(new_tokens):
            result.logits.append(out.logits[0, -1])
            result.tokens.append(int(out.logits[0, -1].argmax()))
            if step == new_tokens - 1:
                return result
            hand.rule = policy if step >= policy.warm_up_tokens else None
            hand.start()
            # Some hybrids do not find the position in a cache whose first layer has no keys.
            place = {"position_ids": torch.tensor([[len(prompt) + step]])} if positions else {}
            ids = torch.tensor([[result.tokens[-1]]])
            out = model(ids, past_key_values=out.past_key_values, use_cache=True, **place)
            result.skipped.append(hand.skipped)
            result.cosines += hand.cosines
    raise AssertionError
