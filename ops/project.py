"""project: linears of a decode step, side by side in one launch.

    x = RMSNorm(h) * norm, or h        y = [W0 x + b0, W1 x + b1, W2 x + b2]        y += residual

Queries, keys and values are three matrices with a norm before them; attention's output is one, whose
result is added to the stream. Rows of the matrices are dealt to programs, none of which has rows of two.
A single row goes through plain multiply-adds, with the norm in the same launch: what it divides by is
one number, which comes last. Several go through matrix products, with a launch of the norm before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipcal.ops.lang import jit, runs_kernels, tl
from skipcal.ops.rms_norm import rms_norm
from skipcal.ops.settings import Settings, row_class, settings_for

_MOST = 3  # matrices


def project(
    h: Tensor,
    matrices: Sequence[Tensor],
    *,
    biases: Sequence[Tensor] | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
    settings: Settings | None = None,
) -> Tensor:
    """y [rows, all outputs] in h's dtype.

    h: [rows, inputs], contiguous, at most 64 rows. matrices: up to three [outputs, inputs], the second and
    the third of one shape; biases: [outputs] each, or None. norm: [inputs], of an RMSNorm with `eps`, or
    None. residual: [rows, all outputs] or None; what is added to it has been rounded. All of one dtype
    and contiguous. settings: in place of those of skipcal.ops.settings. ValueError: shapes other than these.
    """
    _check(h, matrices, biases, residual)
    if not runs_kernels(h):
        return reference(h, matrices, biases=biases, norm=norm, eps=eps, residual=residual)
    rows, inputs = h.shape
    first, other = len(matrices[0]), len(matrices[1]) if len(matrices) > 1 else 0
    y = h.new_empty(rows, sum(map(len, matrices)))
    filled = [*matrices, *[matrices[0]] * (_MOST - len(matrices))]  # unused pointers must still be some
    offsets = [*biases, *[biases[0]] * (_MOST - len(biases))] if biases else filled
    shape = {
        "INPUTS": inputs, "FIRST": first, "OTHER": other, "OUTPUTS": y.shape[1],
        "HAS_BIAS": bool(biases), "HAS_RESIDUAL": residual is not None,
    }  # fmt: skip
    added = y if residual is None else residual
    n, k, warps, stages = settings_for("project", h, y.shape[1], given=settings)
    grid = (-(-first // n) + (len(matrices) - 1) * -(-other // n),)
    if rows == 1:
        _project_one[grid](
            h, h if norm is None else norm, *filled, *offsets, added, y, eps, **shape,
            HAS_NORM=norm is not None, BLOCK_N=n, BLOCK_K=k, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        return y
    x = h if norm is None else rms_norm(h, norm, eps)
    _project_some[grid](
        x, *filled, *offsets, added, y, rows, **shape,
        PADDED=row_class(rows), BLOCK_N=n, BLOCK_K=k, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return y


def reference(
    h: Tensor,
    matrices: Sequence[Tensor],
    *,
    biases: Sequence[Tensor] | None = None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The same in torch, in float32 but for the result."""
    x = h.float()
    if norm is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm.float()
    parts = [x @ matrix.float().T for matrix in matrices]
    if biases is not None:
        parts = [part + bias.float() for part, bias in zip(parts, biases, strict=True)]
    y = torch.cat(parts, dim=-1).to(h.dtype)
    return y if residual is None else residual + y


def _check(
    h: Tensor, matrices: Sequence[Tensor], biases: Sequence[Tensor] | None, residual: Tensor | None
) -> None:
    inputs, shapes = h.shape[1], [tuple(matrix.shape) for matrix in matrices]
    if not 1 <= len(shapes) <= _MOST or {s[1] for s in shapes} != {inputs} or len(set(shapes[1:])) > 1:
        raise ValueError(f"project: up to three matrices of {inputs} columns, two alike, not {shapes}")
    if biases is not None and [tuple(bias.shape) for bias in biases] != [s[:1] for s in shapes]:
        raise ValueError(f"project: biases {[tuple(b.shape) for b in biases]} do not fit {shapes}")
    outputs = sum(s[0] for s in shapes)
    if residual is not None and residual.shape != (len(h), outputs):
        raise ValueError(f"project: residual {tuple(residual.shape)} must be {(len(h), outputs)}")


@jit
def _rows_of_program(
    w0_ptr: tl.tensor, w1_ptr: tl.tensor, w2_ptr: tl.tensor, b0_ptr: tl.tensor, b1_ptr: tl.tensor,
    b2_ptr: tl.tensor, FIRST: tl.constexpr, OTHER: tl.constexpr, BLOCK_N: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Of a program its matrix and bias, its rows of them, which of these exist, and where y begins."""
    blocks: tl.constexpr = (FIRST + BLOCK_N - 1) // BLOCK_N
    more: tl.constexpr = (OTHER + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    second = program >= blocks
    third = program >= blocks + more
    w_ptr = tl.where(third, w2_ptr, tl.where(second, w1_ptr, w0_ptr))
    b_ptr = tl.where(third, b2_ptr, tl.where(second, b1_ptr, b0_ptr))
    program -= tl.where(third, blocks + more, tl.where(second, blocks, 0))
    n = program * BLOCK_N + tl.arange(0, BLOCK_N)
    y = tl.where(third, FIRST + OTHER, tl.where(second, FIRST, 0))
    return w_ptr, b_ptr, n, n < tl.where(second, OTHER, FIRST), y


@jit
def _project_one(
    h_ptr: tl.tensor, norm_ptr: tl.tensor, w0_ptr: tl.tensor, w1_ptr: tl.tensor, w2_ptr: tl.tensor,
    b0_ptr: tl.tensor, b1_ptr: tl.tensor, b2_ptr: tl.tensor, residual_ptr: tl.tensor, y_ptr: tl.tensor,
    eps: float, INPUTS: tl.constexpr, FIRST: tl.constexpr, OTHER: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    w_ptr, b_ptr, n, inside_n, first = _rows_of_program(
        w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, FIRST, OTHER, BLOCK_N
    )
    row = n.to(tl.int64)[:, None] * INPUTS
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside_k = k < INPUTS
        x = tl.load(h_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
        if HAS_NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + k, mask=inside_k, other=0.0).to(tl.float32)
        inside = inside_n[:, None] & inside_k[None, :]
        w = tl.load(w_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, axis=1)
    if HAS_NORM:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / INPUTS + eps)
    if HAS_BIAS:
        y += tl.load(b_ptr + n, mask=inside_n, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + first + n, mask=inside_n, other=0.0).to(tl.float32)
    tl.store(y_ptr + first + n, y.to(y_ptr.dtype.element_ty), mask=inside_n)


@jit(varying=("rows",))
def _project_some(
    x_ptr: tl.tensor, w0_ptr: tl.tensor, w1_ptr: tl.tensor, w2_ptr: tl.tensor,
    b0_ptr: tl.tensor, b1_ptr: tl.tensor, b2_ptr: tl.tensor, residual_ptr: tl.tensor, y_ptr: tl.tensor,
    rows: int, INPUTS: tl.constexpr, FIRST: tl.constexpr, OTHER: tl.constexpr, OUTPUTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    w_ptr, b_ptr, n, inside_n, first = _rows_of_program(
        w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, FIRST, OTHER, BLOCK_N
    )
    r = tl.arange(0, PADDED)
    row = n.to(tl.int64)[:, None] * INPUTS
    y = tl.zeros([BLOCK_N, PADDED], tl.float32)
    for start in tl.range(0, INPUTS, BLOCK_K, num_stages=STAGES):
        k = start + tl.arange(0, BLOCK_K)
        inside_k = k < INPUTS
        given = (r < rows)[None, :] & inside_k[:, None]
        x = tl.load(x_ptr + r[None, :] * INPUTS + k[:, None], mask=given, other=0.0)
        inside = inside_n[:, None] & inside_k[None, :]
        w = tl.load(w_ptr + row + k[None, :], mask=inside, other=0.0, eviction_policy="evict_first")
        y = tl.dot(w, x, y, input_precision="ieee")
    if HAS_BIAS:
        y += tl.load(b_ptr + n, mask=inside_n, other=0.0).to(tl.float32)[:, None]
    where = r[None, :] * OUTPUTS + first + n[:, None]
    wanted = (r < rows)[None, :] & inside_n[:, None]
    if HAS_RESIDUAL:
        y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y += tl.load(residual_ptr + where, mask=wanted, other=0.0).to(tl.float32)
    tl.store(y_ptr + where, y.to(y_ptr.dtype.element_ty), mask=wanted)
