"""What one token reads of the weights of some modules: of a mixture's experts, those it is routed to."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

# What the configurations of transformers call the number of experts, and of those that a token uses.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k")
# `experts` as a part of a name; routers and shared experts have other names.
_OF_AN_EXPERT = re.compile(r"(^|\.)experts\.")


def is_mixture(modules: Iterable[nn.Module], config: Any) -> bool:
    """Whether any weight of the modules belongs to one of several experts."""
    experts = _number(config, _EXPERTS, 0)
    return any(_of_an_expert(name, tensor, experts) for name, tensor in _weights(modules))


def bytes_read(modules: Iterable[nn.Module], config: Any, layer: int) -> int:
    """Bytes of parameters and buffers (quantized weights are buffers in some formats) per token.

    Tensors that modules share count once. Where a configuration has no number of routed experts, all
    of them count.
    """
    experts, routed = _number(config, _EXPERTS, layer), _number(config, _ROUTED, layer)
    share = min(routed / experts, 1.0) if experts and routed else 1.0
    seen: dict[int, float] = {}
    for name, tensor in _weights(modules):
        part = share if _of_an_expert(name, tensor, experts) else 1.0
        seen[id(tensor)] = part * tensor.numel() * tensor.element_size()
    return round(sum(seen.values()))


def _weights(modules: Iterable[nn.Module]) -> Iterable[tuple[str, Tensor]]:
    for module in modules:
        yield from module.named_parameters()
        yield from module.named_buffers()


def _of_an_expert(name: str, tensor: Tensor, experts: int | None) -> bool:
    stacked = tensor.dim() == 3 and tensor.shape[0] == experts  # all experts' matrices in one tensor
    return stacked or _OF_AN_EXPERT.search(name) is not None


def _number(config: Any, names: tuple[str, ...], layer: int) -> int | None:
    """The first of these settings; some families have one entry a layer, some a configuration within."""
    for holder in (config, getattr(config, "ffn_config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, list | tuple):
                value = value[layer] if layer < len(value) else None
            if isinstance(value, int) and value > 0:
                return value
    return None
