"""Where vLLM keeps the FFN blocks of a model, and which of its models are laid out as is needed.

Its decoder layers carry the stream as a pair whose sum it is, and the norm before the FFN forms that sum:
`x, h = norm(x, residual)`. So h, the stream that enters the FFN block, is what this norm returns second; what
the FFN makes of x is f, and the next norm adds it to h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from skipcal.arch.families import FAMILIES, PRE_NORM
from skipcal.errors import UnsupportedModel

# Class of vLLM's model by `config.model_type`: another class for the same type has other layers.
LAID_OUT = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, eq=False)
class ServedBlock:
    """The FFN block of one decoder layer in vLLM. after: the norm that adds f to h."""

    index: int
    norm: nn.Module
    ffn: nn.Module
    after: nn.Module

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which precision the layer computes."""
        weight = next(self.norm.parameters())
        return weight.device, weight.dtype


def check_family(model_type: str, architectures: list[str]) -> None:
    """Raise UnsupportedModel for a kind of model that is not laid out as Llama is in vLLM."""
    if model_type not in LAID_OUT:
        raise UnsupportedModel(
            f"models of type {model_type!r} cannot be served with skipping: their layers are not known to "
            f"be laid out in vLLM as Llama's are; those that can: {', '.join(LAID_OUT)}"
        )
    other = [name for name in architectures if name != LAID_OUT[model_type]]
    if other:
        raise UnsupportedModel(
            f"the model is a {', '.join(other)}; of type {model_type!r} only {LAID_OUT[model_type]} can be "
            "served with skipping"
        )


def blocks_of(model: Any, model_type: str) -> tuple[ServedBlock, ...]:
    """The blocks of a loaded model. Raises UnsupportedModel where it is another than its type says."""
    found = type(model).__name__
    if found != LAID_OUT.get(model_type):
        raise UnsupportedModel(
            f"vLLM runs the model as {found}, skipping needs {LAID_OUT.get(model_type)}; leave out "
            "--model-impl and other options that choose the class"
        )
    family = FAMILIES[model_type][0]
    assert family.chain == PRE_NORM
    norm, ffn = PRE_NORM
    stack = model.model
    layers = list(stack.layers)
    after = [*(layer.input_layernorm for layer in layers[1:]), stack.norm]
    return tuple(
        ServedBlock(index, getattr(layer, norm), getattr(layer, ffn), last)
        for index, (layer, last) in enumerate(zip(layers, after, strict=True))
    )
