"""rms_norm: a root-mean-square norm of each row of a decode step, in one launch.

x = round(h / sqrt(mean(h^2) + eps)) * weight
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipcal.ops.lang import jit, padded, runs_kernels, tl

_WARPS = 4


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, hidden] in h's dtype, rounded before and after the product, as Llama's norm does.

    h: [rows, hidden], contiguous. weight: [hidden], of h's dtype.
    """
    if not runs_kernels(h):
        return reference(h, weight, eps)
    rows, hidden = h.shape
    x = torch.empty_like(h)
    _rms_norm[(rows,)](h, weight, x, eps, HIDDEN=hidden, BLOCK=padded(hidden), num_warps=_WARPS)
    return x


def reference(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same in torch."""
    x = h.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(h.dtype) * weight


@jit
def _rms_norm(
    h_ptr: tl.tensor, weight_ptr: tl.tensor, x_ptr: tl.tensor, eps: float,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row, which fits into its registers."""
    dtype = x_ptr.dtype.element_ty
    row = tl.program_id(0) * HIDDEN
    k = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + row + k, mask=k < HIDDEN, other=0.0).to(tl.float32)
    x = (h * tl.rsqrt(tl.sum(h * h, axis=0) / HIDDEN + eps)).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + k, mask=k < HIDDEN, other=0.0).to(tl.float32)
    tl.store(x_ptr + row + k, (x * weight).to(dtype), mask=k < HIDDEN)
