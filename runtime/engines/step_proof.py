"""How far a prepared step is from the model's own pass: what is asked before anybody uses its results.

Logits alone tell too little. Rounding grows from layer to layer: in half precision forty layers move the
logits about as far as one wrong matrix does. So the layers are *led*: each is given the very stream
that the model's own pass gave it, and judged by what it alone adds. Its noise is then one layer's, however
deep the model is, and a matrix of another layer, a mask or a position that is not its own stands out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipcal.arch.blocks import Block, first_input, first_output
from skipcal.arch.patch import InstancePatches

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Deviation:
    """How far a part of a step is from the model's own, relative to its size; up to `limit` it is noise."""

    of: str
    error: float
    limit: float

    @property
    def is_noise(self) -> bool:
        """Whether rounding explains it; what is no number is none."""
        return self.error <= self.limit

    def __str__(self) -> str:
        """In words."""
        return f"{self.of} is off by {self.error:.1e} of its size, over {self.limit:.0e}"


class LayerStreams:
    """The stream [rows, hidden] before and after each layer, in one pass over one token a row."""

    def __init__(self, blocks: Sequence[Block]) -> None:
        """Nothing is noted yet."""
        self._blocks = blocks
        self._entered: dict[int, Tensor] = {}
        self._left: dict[int, Tensor] = {}
        self._errors: list[Tensor] = []

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Inside, a pass is noted."""
        patches = InstancePatches()
        try:
            for block in self._blocks:
                patches.before_forward(block.layer, self._enter(block.index))
                patches.after_forward(block.layer, self._leave(block.index))
            yield
        finally:
            patches.restore()

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Inside, each layer of another pass over the same tokens is compared, and its output replaced."""
        self._errors = []
        patches = InstancePatches()
        try:
            for block in self._blocks:
                patches.after_forward(block.layer, self._lead(block.index))
            yield
        finally:
            patches.restore()

    def worst(self, limit: float) -> Deviation:
        """The largest deviation of a layer that was led."""
        errors = torch.stack(self._errors).tolist()
        layer = max(range(len(errors)), key=lambda i: errors[i] if errors[i] == errors[i] else float("inf"))
        return Deviation(f"layer {self._blocks[layer].index} of a step", errors[layer], limit)

    def _enter(self, layer: int) -> Any:
        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._entered[layer] = first_input(args, kwargs).detach().clone()

        return note

    def _leave(self, layer: int) -> Any:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            self._left[layer] = first_output(output).detach().clone()

        return note

    def _lead(self, layer: int) -> Any:
        def lead(_module: nn.Module, _args: Any, output: Any) -> Any:
            own = self._left[layer]
            self._errors.append(added_error(first_output(output), own, self._entered[layer]))
            return (own, *output[1:]) if isinstance(output, tuple) else own

        return lead


def added_error(mine: Tensor, own: Tensor, entered: Tensor) -> Tensor:
    """How far what a layer adds to its stream is from the model's own, 0-d: the worst row's, by norms.

    Streams [..., hidden]. Two roundings of an element of the stream to its dtype are passed over: of a long
    stream they can be all of a small sum.
    """
    eps = torch.finfo(own.dtype).eps
    a, b, h = (t.reshape(-1, t.shape[-1]).float() for t in (mine, own, entered))
    off = ((a - b).abs() - 2 * eps * b.abs()).clamp_min(0)
    return (_norms(off) / _norms(b - h).clamp_min(_TINY)).max()


def logits_deviation(of: str, mine: Tensor, own: Tensor, limit: float) -> Deviation:
    """Of logits [rows, vocabulary], each row centred: what all of them share says nothing of a text."""
    a, b = (t.float() - t.float().mean(-1, keepdim=True) for t in (mine, own))
    error = float((_norms(a - b) / _norms(b).clamp_min(_TINY)).max())
    return Deviation(of, error, limit)


def _norms(t: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(t, dim=-1)
    return norms
