"""Triton where it is installed.

A CPU build of torch brings no Triton. Then kernels stay plain functions that nobody calls, and the
launchers run their references.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from torch import Tensor

__all__ = ["DOT_ROWS", "jit", "padded", "runs_kernels", "tl", "triton"]

DOT_ROWS = 16  # the smallest width of a matrix product

_HAS_TRITON = find_spec("triton") is not None
if TYPE_CHECKING or _HAS_TRITON:
    import triton
    import triton.language as tl
else:
    triton = tl = None


def jit(
    kernel: Callable[..., Any] | None = None, *, varying: Sequence[str] = (), unaligned: Sequence[str] = ()
) -> Any:
    """`triton.jit`; without Triton the function itself.

    Triton compiles a kernel anew for an integer that is 1 or a multiple of 16 where it was not, and for
    a pointer that is a multiple of 16 where it was not. varying: integers, and unaligned: pointers, that
    change from call to call and gain nothing by it.

    Of a kernel's annotations Triton reads `tl.constexpr`, int and float, as text. No other name may
    stand in one that the compiler does not know, though its interpreter would not mind.
    """
    if kernel is None:
        return partial(jit, varying=varying, unaligned=unaligned)
    if not _HAS_TRITON:
        return kernel
    return triton.jit(kernel, do_not_specialize=varying, do_not_specialize_on_alignment=unaligned)


def runs_kernels(tensor: Tensor) -> bool:
    """Whether a launcher can give `tensor` to its kernel: on CUDA, or in Triton's interpreter."""
    return _HAS_TRITON and (tensor.is_cuda or bool(triton.knobs.runtime.interpret))


def padded(size: int) -> int:
    """The next power of two, for Triton's blocks have no other sizes."""
    return 1 << (size - 1).bit_length()
