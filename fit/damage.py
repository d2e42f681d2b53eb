"""What it costs the model's predictions when an FFN block's contribution is off by delta.

`FisherDamage`: to second order the expected loss rises by 1/2 deltaT G delta, where G is the Fisher matrix
of the stream after the block: the mean of g gT over tokens, g the gradient of the loss of labels *sampled
from the model*. One backward pass over a few rows gives G for every layer. It is the diagonal block of
the curvature for this layer and token, so damages of several skips are taken to add up.

G is a mean, but tokens differ: where the model is sure of what comes next, an error harms little. The same
gradients tell how much: a linear probe of log |g|^2 from what a gate sees says which tokens those are
(ours; it explains 0.2 to 0.5 of the variance on SmolLM2, more in later layers).

`RelativeDamage`: |delta|^2 / |h|^2, times a weight for each layer: for models that cannot run backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from skipcal.arch.blocks import observe_sums
from skipcal.arch.locate import Architecture, observe
from skipcal.fit.gate import gate_inputs
from skipcal.fit.moments import Linear, Moments, ridge

# Keeps directions that the few rows never saw from counting nothing; relative to the mean diagonal.
SHRINKAGE = 1e-3
SENSITIVITY_PENALTY = 0.1  # few tokens, a noisy target: of 1e-3 to 1 the best R2 on rows left out
_TINY = 1e-30  # a damage whose logarithm can be taken


class Damage(Protocol):
    """Predicts the damage, in nats or in proportion to them."""

    def __call__(self, layer: int, delta: Tensor, h: Tensor) -> Tensor:
        """Damage of each token, [tokens] float32 and above 0; delta and h [tokens, hidden]."""

    def sensitivity(self, layer: int) -> Linear | None:
        """Probe of the log sensitivity of a token, from `gate_inputs`; None: tokens are taken as alike."""

    def metric(self, layer: int) -> Tensor | None:
        """G of a damage deltaT G delta, up to a factor, [hidden, hidden]; None: |delta|^2."""


@dataclass(frozen=True)
class FisherDamage:
    """1/2 deltaT G delta, in nats.

    fisher: [hidden, hidden] by layer, float32. probes: of log |g|^2, relative to its mean, by layer.
    """

    fisher: Mapping[int, Tensor]
    probes: Mapping[int, Linear] = field(default_factory=dict)

    def sensitivity(self, layer: int) -> Linear | None:
        """The layer's probe."""
        return self.probes.get(layer)

    def metric(self, layer: int) -> Tensor | None:
        """The Fisher matrix."""
        return self.fisher[layer]

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

    def sensitivity(self, layer: int) -> Linear | None:
        """Nothing is known of tokens without gradients."""
        return None

    def metric(self, layer: int) -> Tensor | None:
        """Nothing is known of directions."""
        return None

    def __call__(self, layer: int, delta: Tensor, h: Tensor) -> Tensor:
        """Damage of each token."""
        weight = self.weights.get(layer, 1.0)
        relative: Tensor = delta.float().square().sum(-1) / h.float().square().sum(-1).clamp_min(_TINY)
        return (weight * relative).clamp_min(_TINY)


def fisher_damage(
    model: Any, architecture: Architecture, batches: Iterable[Tensor], *, first: int, seed: int
) -> FisherDamage:
    """Fisher matrices and sensitivity probes from rows of token ids, in batches [batch, seq].

    first: positions below it count nowhere, neither their losses nor their gradients.
    """
    sums: dict[int, Tensor] = {}
    probed: dict[int, Moments] = {}
    count = 0
    for ids in batches:
        generator = torch.Generator(device=ids.device).manual_seed(seed + count)
        streams, gradients = _with_streams(model, architecture, ids, first, generator)
        for layer, gradient in gradients.items():
            g = gradient[:, first:].flatten(0, 1).float()
            h = streams[layer].reshape(*ids.shape, -1)[:, first:].flatten(0, 1)
            if layer not in sums:
                sums[layer] = torch.zeros(g.shape[-1], g.shape[-1], device=g.device)
                probed[layer] = Moments.empty(g.shape[-1] + 1, 1, g.device)
            sums[layer] += g.T @ g
            probed[layer].add(gate_inputs(h), g.square().sum(-1, keepdim=True).clamp_min(_TINY).log())
        count += ids[:, first:].numel()
    return FisherDamage(
        fisher={layer: _shrunk(total / count) for layer, total in sums.items()},
        probes={
            layer: _relative(moments, math.log(float(sums[layer].trace()) / count))
            for layer, moments in probed.items()
        },
    )


def _relative(moments: Moments, log_mean: float) -> Linear:
    """The probe of log(|g|^2 / mean |g|^2)."""
    found = ridge(moments, SENSITIVITY_PENALTY)
    return Linear(found.coefficients, found.intercept - log_mean)


def _with_streams(
    model: Any, architecture: Architecture, ids: Tensor, first: int, generator: torch.Generator
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The stream that enters each FFN block, as its layer passes it, and `loss_gradients`."""
    entering: dict[int, Tensor] = {}

    def keep(layer: int, h: Tensor, _f: Tensor) -> None:
        entering[layer] = h.detach().clone()  # some layers go on to change it in place

    with observe(architecture.blocks, keep):
        gradients = loss_gradients(model, architecture, ids, first, generator)
    return entering, gradients


def loss_gradients(
    model: Any, architecture: Architecture, ids: Tensor, first: int, generator: torch.Generator
) -> dict[int, Tensor]:
    """Gradients of the summed loss of sampled labels for the stream h + f after each block.

    ids [batch, seq] -> [batch, seq, hidden] by layer. The model is left as it was.
    """
    streams: dict[int, Tensor] = {}
    blocks = architecture.blocks
    handle = blocks[0].layer.register_forward_pre_hook(_as_leaf, with_kwargs=True)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            with observe_sums(blocks, lambda index, total, _output: streams.update({index: total})):
                logits = model(input_ids=ids, use_cache=False).logits[:, first:].float().flatten(0, 1)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            found = torch.autograd.grad(loss, [streams[block.index] for block in blocks])
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    return {
        block.index: (gradient if block.returns_the_sum else gradient * block.output_scale).view(
            *ids.shape, -1
        )
        for block, gradient in zip(blocks, found, strict=True)
    }


def _as_leaf(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The stream that enters the first layer, as the place where gradients begin."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _shrunk(metric: Tensor) -> Tensor:
    return metric + SHRINKAGE * metric.diagonal().mean() * torch.eye(len(metric), device=metric.device)
