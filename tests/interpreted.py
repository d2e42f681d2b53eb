"""Triton's interpreter, which runs kernels without a GPU: what it read, and what has to be mended."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor


def mend_loop_bounds() -> None:
    """Let `range` take bounds that a kernel computed.

    The interpreter of Triton 3.6 makes an int of an array of one element by `int`, which NumPy 2.4
    refuses; 3.7 does as here.
    """
    from triton.runtime import interpreter  # importing it reads TRITON_INTERPRET

    patch = interpreter._patch_lang_tensor

    def patch_and_mend(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_and_mend


class Reads:
    """The addresses that interpreted kernels loaded from, with how often."""

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def add(self, addresses: Any, mask: Any) -> None:
        self._times.update(np.asarray(addresses)[np.asarray(mask)].ravel().tolist())

    def of(self, tensor: Tensor) -> Tensor:
        """How often each element was loaded, in the tensor's shape."""
        offsets = torch.zeros(tensor.shape, dtype=torch.long)
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            steps = torch.arange(size) * stride
            offsets += steps.view(-1, *[1] * (tensor.dim() - axis - 1))
        addresses = tensor.data_ptr() + offsets.ravel() * tensor.element_size()
        return torch.tensor([self._times[a] for a in addresses.tolist()]).view(tensor.shape)
