"""The proof that vLLM adds up what it seems to: on a full pass, h + f is the stream that goes on.

`skipcal.arch.proof` proves models of transformers by the same sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from skipcal.arch.patch import InstancePatches
from skipcal.arch.proof import PROOF_TOKENS, PROOF_TOLERANCE_EPS
from skipcal.errors import UnsupportedModel
from skipcal.serving.blocks import ServedBlock


class SumProof:
    """Watches a pass inside `with`; `check` afterwards judges every layer."""

    def __init__(self, blocks: Sequence[ServedBlock], tokens: int) -> None:
        """Nothing is set on the model yet. tokens: those of the pass; rows beyond them are padding."""
        self._first = slice(0, min(tokens, PROOF_TOKENS))
        self._blocks = blocks
        self._patches = InstancePatches()
        self._h: Tensor | None = None
        self._f: Tensor | None = None
        self._errors: dict[int, float] = {}  # by layer: |h + f - sum| relative to its terms, in eps

    def __enter__(self) -> Self:
        """Look at the streams of the pass to come."""
        for block in self._blocks:
            self._patches.set(block.norm, "forward", self._after_norm(block.norm.forward))
            last = block.chain[-1]
            self._patches.set(last, "forward", self._after_ffn(block, last.forward))
            self._patches.set(block.after, "forward", self._judging(block, block.after.forward))
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the modules as they were."""
        self._patches.restore()

    def check(self) -> None:
        """Raise UnsupportedModel unless h + f was the stream after every layer."""
        for block in self._blocks:
            error = self._errors.get(block.index)
            if error is None:
                raise UnsupportedModel(
                    f"layer {block.index}: norm, FFN and next norm were not called in turn"
                )
            if not error <= PROOF_TOLERANCE_EPS:
                raise UnsupportedModel(
                    f"layer {block.index}: h + f is not the stream that the next norm makes, but "
                    f"{error:.1e} eps off; this model cannot be served with skipping"
                )

    def _after_norm(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any) -> Any:
            output = own(*given)
            self._h = output[1][self._first].clone()  # later norms may add to it in place
            return output

        return forward

    def _after_ffn(self, block: ServedBlock, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(x: Tensor) -> Any:
            made = own(x)
            self._f = made[self._first] * block.scale  # a tensor of its own
            return made

        return forward

    def _judging(self, block: ServedBlock, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*given: Any) -> Any:
            output = own(*given)
            if self._h is not None and self._f is not None:
                total = block.stream_at(given, output)[self._first]
                self._errors[block.index] = _error(self._h, self._f, total)
            self._h = self._f = None
            return output

        return forward


def _error(h: Tensor, f: Tensor, total: Tensor) -> float:
    """|h + f - total|, the largest of all elements, over |h| + |f| times the dtype's eps."""
    info = torch.finfo(total.dtype)
    stream, added, summed = (t.double().cpu() for t in (h, f, total))
    terms = (stream.abs() + added.abs()) * info.eps + info.tiny
    return float(((stream + added - summed).abs() / terms).max())
