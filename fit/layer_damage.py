"""What a relative error in each layer costs, by forward passes alone: for models that cannot run backwards.

One layer at a time adds only a part of what its FFN says. The divergence of the model's predictions from
what they were, over the relative error that this makes of the stream, is the layer's weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from skipcal.arch.locate import Architecture, observe
from skipcal.fit.damage import RelativeDamage

KEPT = 0.5  # share of f that the layer still adds: surrogates explain about half of it


@torch.no_grad()
def relative_damage(
    model: Any, architecture: Architecture, batches: Iterable[Tensor], *, first: int
) -> RelativeDamage:
    """Weights from rows of token ids in batches [batch, seq]: L + 1 forward passes over each.

    first: positions below it count nowhere.
    """
    divergence = [0.0] * architecture.num_layers
    error = [0.0] * architecture.num_layers
    for ids in batches:

        def collect(layer: int, h: Tensor, f: Tensor, shape: torch.Size = ids.shape) -> None:
            stream, added = (x.reshape(*shape, -1)[:, first:].float() for x in (h, f))
            relative = added.square().sum(-1) / stream.square().sum(-1).clamp_min(1e-30)
            error[layer] += float(relative.sum()) * (1 - KEPT) ** 2

        with observe(architecture.blocks, collect):
            full = _log_chances(model, ids, first)
        for block in architecture.blocks:
            handles = [module.register_forward_hook(_damped) for module in block.outputs]
            try:
                damped = _log_chances(model, ids, first)
            finally:
                for handle in handles:
                    handle.remove()
            divergence[block.index] += float((full.exp() * (full - damped)).sum())
    weights = {
        i: max(d, 1e-12) / max(e, 1e-12) for i, (d, e) in enumerate(zip(divergence, error, strict=True))
    }
    return RelativeDamage(weights)


def _log_chances(model: Any, ids: Tensor, first: int) -> Tensor:
    logits: Tensor = model(input_ids=ids, use_cache=False).logits[:, first:].float()
    return logits.log_softmax(-1)


def _damped(_module: nn.Module, _args: Any, output: Any) -> Any:
    return (output[0] * KEPT, *output[1:]) if isinstance(output, tuple) else output * KEPT
