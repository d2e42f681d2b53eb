"""The numerical proof that a located block is what it seems, on a few tokens of a real forward pass.

Two rows of tokens run through the model, alike in their first half. In each layer, h and f as the
block's hooks read them have to add up to the sum that the layer makes of them. And what comes later
must not change what came before, neither in the stream nor in what the FFN makes of it: skipping
is decided and done token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from skipcal.arch.blocks import Block, first_input, input_device, observe, observe_sums

PROOF_TOKENS = 8
_ALIKE = PROOF_TOKENS // 2  # tokens that both rows have in common
# Each rounding is half an eps of a partial sum. h + f is formed here in float64; the layer rounds
# scale * f, stream_scale * h and the sum: 1.5 eps of |h| + |f| at most. In parallel layers h = x + a
# is rounded by us, and the layer rounds two sums in an order of its own, of terms up to
# 2|x| + |h| + |f|: 1.5 eps of these.
PROOF_TOLERANCE_EPS = 2.0


@torch.no_grad()
def prove(model: PreTrainedModel, blocks: Sequence[Block]) -> list[float | str]:
    """For each block the largest relative error of `h + f == sum`, or in words why it is none.

    Several blocks may be proposed for one layer: one forward pass judges them all.
    """
    numbered = tuple(replace(block, index=place) for place, block in enumerate(blocks))
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    times = [0] * len(numbered)
    found: list[float | str] = ["the modules were not called in that order"] * len(numbered)
    entering: dict[int, Tensor] = {}

    def keep(place: int, h: Tensor, f: Tensor) -> None:
        times[place] += 1
        seen[place] = (h.detach().clone(), f.detach().clone())

    def judge(place: int, total: Tensor, output: Any) -> None:
        if place in seen:
            block, (h, f) = numbered[place], seen.pop(place)
            found[place] = _judged(block, h, f, total, entering.get(id(block.layer)))

    handles = [
        layer.register_forward_pre_hook(_keep_input(entering, id(layer)), with_kwargs=True)
        for layer in {id(b.layer): b.layer for b in numbered if b.attention is not None}.values()
    ]
    try:
        with evaluating(model), observe(numbered, keep), observe_sums(numbered, judge):
            model(input_ids=proof_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [
        f"its modules were called {count} times in one pass" if count > 1 else result
        for count, result in zip(times, found, strict=True)
    ]


def proof_ids(model: PreTrainedModel) -> Tensor:
    """Two rows of token ids [2, PROOF_TOKENS], alike in their first half."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(1, PROOF_TOKENS + 1).repeat(2, 1)
    ids[1, _ALIKE:] += PROOF_TOKENS
    picked: Tensor = (ids % vocabulary).to(input_device(model))
    return picked


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model without dropout, which sits between the FFN and the sum in some families."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _keep_input(entering: dict[int, Tensor], key: int) -> Callable[..., None]:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entering[key] = first_input(args, kwargs).detach().clone()

    return hook


def _judged(block: Block, h: Tensor, f: Tensor, total: Tensor, x: Tensor | None) -> float | str:
    """The block's largest relative error, or what is wrong. x: what a parallel layer is given."""
    if not isinstance(total, Tensor) or not h.shape[-1] == f.shape[-1] == total.shape[-1]:
        return "its output is no stream of the layer's width"
    eps = max(torch.finfo(t.dtype).eps for t in (h, f, total))
    floor = torch.finfo(total.dtype).tiny  # below it a rounding is no share of the number any more
    stream, added, summed = (_exact(t) for t in (h, f, total))
    if not stream.shape == added.shape == summed.shape:
        return "its output is not one vector a token"
    terms = stream.abs() + added.abs()
    if block.attention is not None and x is not None:
        terms += 2 * _exact(x).abs()
    scale = torch.as_tensor(block.output_scale).detach().cpu().double()
    # Element by element: an element that is huge must not hide the errors of the others.
    error = float((((stream + added) * scale - summed).abs() / (terms * scale.abs() + floor)).max())
    limit = PROOF_TOLERANCE_EPS * eps
    if not error <= limit:
        return f"|h + f - sum| is {error:.1e} of its scale, over {limit:.1e}"
    for name, values in (("stream", stream), ("FFN's output", added)):
        # Rounding differs between rows by a few eps a layer; the root of eps is half of all digits.
        if (share := _changed_by_later_tokens(values)) > math.sqrt(eps):
            return f"later tokens change an earlier token's {name} by {share:.1e}: it is not causal"
    return error


def _changed_by_later_tokens(values: Tensor) -> float:
    """How much a token differs between two rows that are alike up to it: median of relative norms."""
    rows = values.reshape(2, PROOF_TOKENS, -1)[:, :_ALIKE]
    off, size = (rows[0] - rows[1]).norm(dim=-1), rows[0].norm(dim=-1)
    return float((off / size.clamp_min(torch.finfo(torch.float32).tiny)).median())


def _exact(x: Tensor) -> Tensor:
    """[batch, seq, hidden] as [tokens, hidden] in float64, on the CPU: not every device knows it."""
    return x.detach().cpu().double().reshape(-1, x.shape[-1])
