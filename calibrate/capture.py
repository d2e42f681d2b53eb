"""Capture `cos_i` and `‖f_i‖/‖h_i‖` while a model runs, and keep nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from skipcal.arch.locate import Architecture, locate, observe
from skipcal.core.residual import norm_ratio, residual_cosine
from skipcal.errors import SessionError


class Recorder:
    """Collects the statistics of one forward pass at a time; `take` hands them over."""

    def __init__(self, num_layers: int) -> None:
        """Expect `num_layers` blocks in each pass."""
        self._num_layers = num_layers
        self._passed: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(self, layer: int, h: Tensor, f: Tensor) -> None:
        """Reduce one block's [..., hidden] to a cosine and a norm ratio per token, on the device."""
        self._passed[layer] = residual_cosine(h, f).flatten(), norm_ratio(h, f).flatten()

    def take(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and norm ratios of the last forward pass, each [batch * seq, layers] float32.

        This is the one place where the host waits for the device.
        """
        if len(self._passed) != self._num_layers:
            raise SessionError(
                f"{len(self._passed)} of {self._num_layers} FFN blocks were seen; run one forward pass "
                "inside capture(...) before take()"
            )
        ordered = [self._passed[layer] for layer in range(self._num_layers)]
        self._passed = {}
        device = ordered[0][0].device  # layers may lie on several devices
        both = torch.stack([torch.stack([part.to(device) for part in pair]) for pair in ordered])
        cosines, ratios = both.permute(1, 2, 0).cpu().numpy()  # [2, tokens, layers]
        return cosines, ratios


@contextmanager
def capture(model: nn.Module, *, architecture: Architecture | None = None) -> Iterator[Recorder]:
    """Yield a Recorder that sees every FFN block of `model`; no hook is left afterwards.

    The model computes what it always does, bit for bit; h and f are read, never kept.
    `architecture` saves locating the blocks again.
    """
    found = architecture or locate(model)
    recorder = Recorder(found.num_layers)
    with observe(found.blocks, recorder.observe):
        yield recorder
