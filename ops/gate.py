"""gate: the learned gate's decision, before an FFN runs, for each row of a decode step.

    score = weight . u + log_norm_weight * log ||h|| + bias,   u = sqrt(hidden) * h / ||h||
    skip  = score < threshold                                                         (ours)

One launch, one read of h. The decision stays on the device: what follows reads it as a flag.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from skipcal.core.surrogates import direction
from skipcal.ops.lang import jit, padded, runs_kernels, tl

_TINY = torch.finfo(torch.float32).tiny
_FLAGS = (torch.bool, torch.int8)
_WARPS = 8  # a row of 4096 is then 16 values a thread; not yet tuned on a device


class GateDecision(NamedTuple):
    """What the gate says of each row."""

    skip: Tensor  # [batch] bool: the FFN is skipped
    score: Tensor  # [batch] float32: the predicted damage


def gate(
    h: Tensor,
    weight: Tensor,
    *,
    log_norm_weight: Tensor,
    bias: Tensor,
    threshold: Tensor,
    active: Tensor | None = None,
    skip: Tensor | None = None,
) -> GateDecision:
    """Decide for each row whether it skips the FFN. A score that is not a number does not skip.

    h: [batch, hidden], the stream before the FFN block. weight: [hidden], log_norm_weight, bias: 0-d,
    float32. threshold: float32, 0-d or one a row [batch]. active: [batch] bool, or int8 where rows may be
    nobody's, rows that may skip; None: all. skip: of the same kind, contiguous, to write the decision to;
    None: it is made. All on h's device; no host sync, so that the launch can be captured. ValueError: shapes
    or dtypes other than these.
    """
    _check(h, weight, log_norm_weight, bias, threshold, [t for t in (active, skip) if t is not None])
    batch, hidden = h.shape
    skip = torch.empty(batch, dtype=torch.bool, device=h.device) if skip is None else skip
    if not runs_kernels(h):
        made = reference(h, weight, log_norm_weight=log_norm_weight, bias=bias, threshold=threshold)
        decided = made.skip if active is None else torch.where(active > 0, made.skip, active)
        return GateDecision(skip.copy_(decided), made.score)
    score = torch.empty(batch, dtype=torch.float32, device=h.device)
    limits, flags = threshold.expand(batch), skip.view(torch.int8)
    _gate[(batch,)](
        h, weight, log_norm_weight, bias, limits, flags if active is None else active.view(torch.int8),
        flags, score, h.stride(0), limits.stride(0),
        HIDDEN=hidden, BLOCK=padded(hidden), TINY=_TINY, HAS_ACTIVE=active is not None, num_warps=_WARPS,
    )  # fmt: skip
    return GateDecision(skip, score)


def reference(
    h: Tensor, weight: Tensor, *, log_norm_weight: Tensor, bias: Tensor, threshold: Tensor
) -> GateDecision:
    """The same in torch, of rows that all may skip."""
    norm = torch.linalg.vector_norm(h.float(), dim=-1).clamp_min(_TINY)  # [batch]
    score = direction(h) @ weight + log_norm_weight * norm.log() + bias
    return GateDecision(score < threshold, score)


def _check(
    h: Tensor, weight: Tensor, log_norm_weight: Tensor, bias: Tensor, threshold: Tensor, flags: list[Tensor]
) -> None:
    batch, hidden = h.shape
    if any(t.shape != (batch,) or t.dtype not in _FLAGS or not t.is_contiguous() for t in flags):
        raise ValueError(f"gate: active and skip must be contiguous bool or int8 [{batch}]")
    if h.stride(1) != 1:
        raise ValueError(f"gate: h must be contiguous along hidden, not of strides {h.stride()}")
    if weight.shape != (hidden,) or not weight.is_contiguous():
        raise ValueError(f"gate: weight must be contiguous [{hidden}], not {list(weight.shape)}")
    if log_norm_weight.dim() or bias.dim() or threshold.shape not in {(), (batch,)}:
        raise ValueError(
            "gate: log_norm_weight and bias must be 0-d and threshold 0-d or "
            f"[{batch}], not {[list(t.shape) for t in (log_norm_weight, bias, threshold)]}"
        )
    if {t.dtype for t in (weight, log_norm_weight, bias, threshold)} != {torch.float32}:
        raise ValueError("gate: weight, log_norm_weight, bias and threshold must be float32")


@jit(unaligned=("log_norm_weight_ptr", "bias_ptr", "threshold_ptr", "active_ptr", "skip_ptr"))
def _gate(
    h_ptr: tl.tensor, weight_ptr: tl.tensor, log_norm_weight_ptr: tl.tensor, bias_ptr: tl.tensor,
    threshold_ptr: tl.tensor, active_ptr: tl.tensor, skip_ptr: tl.tensor, score_ptr: tl.tensor,
    h_stride: int, threshold_stride: int,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, TINY: tl.constexpr, HAS_ACTIVE: tl.constexpr,
) -> None:  # fmt: skip
    """One program a row, which fits into its registers."""
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    h = tl.load(h_ptr + row * h_stride + n, mask=n < HIDDEN, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + n, mask=n < HIDDEN, other=0.0)
    norm = tl.maximum(tl.sqrt(tl.sum(h * h, axis=0)), TINY)
    # By the norm first: sqrt(hidden) over it overflows where it was clamped. After the sum: one division.
    along = tl.sum(weight * h, axis=0) / norm * tl.sqrt(HIDDEN * 1.0)
    score = along + tl.load(log_norm_weight_ptr) * tl.log(norm) + tl.load(bias_ptr)
    tl.store(score_ptr + row, score)
    skip = (score < tl.load(threshold_ptr + row * threshold_stride)).to(tl.int8)
    if HAS_ACTIVE:
        active = tl.load(active_ptr + row)
        skip = tl.where(active > 0, skip, active)
    tl.store(skip_ptr + row, skip)
