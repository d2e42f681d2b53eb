"""Whether Triton can run here; without it the ops fall back on their torch references.

A CUDA build of torch brings Triton, a CPU build does not. With TRITON_INTERPRET=1 in the
environment, set before the kernels are imported, Triton's interpreter runs them on a CPU.
"""

from __future__ import annotations

import os

import torch

try:
    import triton
    import triton.language as tl
    from triton import cdiv, jit, next_power_of_2
except ImportError:  # a CPU build of torch
    triton = tl = None

    def jit(kernel):
        """Leave the kernel as it is: nothing launches it."""
        return kernel

    def cdiv(x: int, y: int) -> int:
        """x / y, rounded up."""
        return -(-x // y)

    def next_power_of_2(n: int) -> int:
        """The smallest power of two that is at least n."""
        return 1 << (n - 1).bit_length()


__all__ = ["cdiv", "jit", "kernels_run_on", "next_power_of_2", "tl"]


def kernels_run_on(device: torch.device) -> bool:
    """Whether the Triton kernels can be launched on `device`."""
    if triton is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
