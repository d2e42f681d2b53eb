"""The two numbers that are taken from a token at an FFN block."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float32).tiny


def residual_cosine(h: Tensor, f: Tensor) -> Tensor:
    """`cos(h, h + f)` over the last dimension, in float32 and within [-1, 1].

    h, f: [..., hidden], any floating dtype. The sum is formed in float32, not rounded to the
    model's dtype, so that every engine takes the same decision. A zero vector gives 0.
    Source: FFN-SkipLLM, arXiv 2404.03865, algorithm 1.
    """
    before = h.float()
    after = before + f.float()
    # F.cosine_similarity would normalise both vectors first: three more passes over memory.
    norms = torch.linalg.vector_norm(before, dim=-1) * torch.linalg.vector_norm(after, dim=-1)
    dot: Tensor = torch.linalg.vecdot(before, after)
    cosine: Tensor = dot / norms.clamp_min(_TINY)
    return cosine.clamp(-1.0, 1.0)


def residual_cosine_of_one(h: Tensor, f: Tensor) -> float:
    """`residual_cosine` of a single token, as a number: h, f [1, hidden] on a CPU.

    The same sum in float32 and half as many operations: on a CPU the price of a decision is their
    number, not their size.
    """
    before = h.float()
    pair = torch.cat((before, before + f.float()))
    (square_before, dot), (_, square_after) = torch.mm(pair, pair.t()).tolist()
    norms = max(math.sqrt(square_before * square_after), _TINY)
    cosine: float = dot / norms
    return min(max(cosine, -1.0), 1.0)


def norm_ratio(h: Tensor, f: Tensor) -> Tensor:
    """`‖f‖ / ‖h‖` over the last dimension, in float32: how much the block adds to the stream."""
    scale: Tensor = torch.linalg.vector_norm(h.float(), dim=-1)
    added: Tensor = torch.linalg.vector_norm(f.float(), dim=-1)
    return added / scale.clamp_min(_TINY)
