"""Random streams and contributions of tokens in a few layers, and their cosines, for tests of rules."""

from __future__ import annotations

import math

import torch

LAYERS, TOKENS, HIDDEN = 7, 40, 4


def streams() -> tuple[torch.Tensor, torch.Tensor]:
    """h and f of every layer and token, [layers, tokens, hidden]: cosines lie all over [-1, 1]."""
    generator = torch.Generator().manual_seed(1)
    h, f = torch.randn(2, LAYERS, TOKENS, HIDDEN, generator=generator)
    return h, 2 * f


def cosine(h: torch.Tensor, f: torch.Tensor) -> float:
    a, b = h.tolist(), (h + f).tolist()
    return float(sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b))
