"""What it costs the model's predictions when an FFN block's contribution is off by delta.

`FisherDamage`: to second order the expected loss rises by 1/2 deltaT G delta, where G is the Fisher matrix
of the stream after the block: the mean of g gT over tokens, g the gradient of the loss of labels *sampled
from the model*. One backward pass over a few rows gives G for every layer. It is the diagonal block of
the curvature for this layer and token, so damages of several skips are taken to add up.

`RelativeDamage`: |delta|^2 / |h|^2, times a weight for each layer: for models that cannot run backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skipcal.arch.locate import Architecture

# Keeps directions that the few rows never saw from counting nothing; relative to the mean diagonal.
SHRINKAGE = 1e-3
_TINY = 1e-30  # a damage whose logarithm can be taken


class Damage(Protocol):
    """Predicts the damage, in nats or in proportion to them."""

    def __call__(self, layer: int, delta: Tensor, h: Tensor) -> Tensor:
        """Damage of each token, [tokens] float32 and above 0; delta and h [tokens, hidden]."""


@dataclass(frozen=True)
class FisherDamage:
    """1/2 deltaT G delta, in nats. fisher: [hidden, hidden] by layer, float32."""

    fisher: Mapping[int, Tensor]

    def __call__(self, layer: int, delta: Tensor, h: Tensor) -> Tensor:
        """Damage of each token."""
        off = delta.float()
        metric = self.fisher[layer].to(off.device)
        damage: Tensor = 0.5 * ((off @ metric) * off).sum(-1)
        return damage.clamp_min(_TINY)


@dataclass(frozen=True)
class RelativeDamage:
    """weight_i |delta|^2 / |h|^2; layers without a weight have 1."""

    weights: Mapping[int, float]

    def __call__(self, layer: int, delta: Tensor, h: Tensor) -> Tensor:
        """Damage of each token."""
        weight = self.weights.get(layer, 1.0)
        relative: Tensor = delta.float().square().sum(-1) / h.float().square().sum(-1).clamp_min(_TINY)
        return (weight * relative).clamp_min(_TINY)


def fisher_damage(
    model: Any, architecture: Architecture, batches: Iterable[Tensor], *, first: int, seed: int
) -> FisherDamage:
    """The Fisher matrices from rows of token ids, in batches [batch, seq].

    first: positions below it count nowhere, neither their losses nor their gradients.
    """
    sums: dict[int, Tensor] = {}
    count = 0
    for ids in batches:
        generator = torch.Generator(device=ids.device).manual_seed(seed + count)
        for layer, gradient in loss_gradients(model, architecture, ids, first, generator).items():
            g = gradient[:, first:].reshape(-1, gradient.shape[-1]).float()
            product = g.T @ g
            sums[layer] = sums[layer] + product if layer in sums else product
        count += ids[:, first:].numel()
    return FisherDamage({layer: _shrunk(total / count) for layer, total in sums.items()})


def loss_gradients(
    model: Any, architecture: Architecture, ids: Tensor, first: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Gradients of the summed loss of sampled labels for the stream after each layer.

    ids [batch, seq] -> [batch, seq, hidden] by layer. The model is left as it was.
    """
    streams: dict[int, Tensor] = {}
    blocks = architecture.blocks
    handles = [blocks[0].layer.register_forward_pre_hook(_as_leaf, with_kwargs=True)]
    handles += [block.layer.register_forward_hook(_keep(streams, block.index)) for block in blocks]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, first:].float().flatten(0, 1)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = torch.autograd.grad(loss, [streams[block.index] for block in blocks])
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    return {block.index: gradient for block, gradient in zip(blocks, found, strict=True)}


def _as_leaf(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream that enters the first layer, as the place where gradients begin."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _keep(streams: dict[int, Tensor], index: int) -> Callable[[nn.Module, Any, Any], None]:
    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        streams[index] = output[0] if isinstance(output, tuple) else output

    return hook


def _shrunk(metric: Tensor) -> Tensor:
    return metric + SHRINKAGE * metric.diagonal().mean() * torch.eye(len(metric), device=metric.device)
