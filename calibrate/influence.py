"""Block Influence: how much a whole layer, attention and FFN, turns the residual stream.

BI_i = 1 - E[cos(x_i, x_{i+1})] over tokens, x_i being the input of layer i (ShortGPT, Men et al.,
arXiv 2403.03853, equation 1). It is measured in the same pass as the FFN cosines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from skipcal.arch.blocks import first_output
from skipcal.arch.locate import Architecture


class LayerCosines:
    """Cosines between input and output of each layer, of one forward pass at a time."""

    def __init__(self, num_layers: int) -> None:
        """Expect `num_layers` layers in each pass."""
        self._num_layers = num_layers
        self._passed: dict[int, Tensor] = {}

    def observe(self, layer: int, entering: Tensor, leaving: Tensor) -> None:
        """Reduce [..., hidden] to one cosine per token, on the device."""
        cosine = torch.nn.functional.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        self._passed[layer] = cosine.flatten()

    def take(self, kept: np.ndarray) -> np.ndarray:
        """Sums [layers] in float64 over the tokens of the last pass in `kept`, [tokens] bool."""
        device = self._passed[0].device
        ordered = torch.stack([self._passed[i].to(device) for i in range(self._num_layers)])
        self._passed = {}
        sums: np.ndarray = ordered.cpu().numpy()[:, kept].sum(axis=1, dtype=np.float64)
        return sums


@contextmanager
def layer_cosines(architecture: Architecture) -> Iterator[LayerCosines]:
    """Yield a LayerCosines that sees every layer; no hook is left afterwards."""
    recorder = LayerCosines(architecture.num_layers)

    def hook(index: int) -> Callable[..., None]:
        def after(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entering = args[0] if args else kwargs["hidden_states"]
            recorder.observe(index, entering, first_output(output))

        return after

    handles = []
    try:
        for block in architecture.blocks:
            handles.append(block.layer.register_forward_hook(hook(block.index), with_kwargs=True))
        yield recorder
    finally:
        for handle in handles:
            handle.remove()
