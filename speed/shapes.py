"""Shapes: models of a known size with random weights, to measure speed without a download."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skipcal.configs.shapes import shapes as shapes
from skipcal.errors import ConfigError, SkipcalError, suggestion
from skipcal.speed.hardware import free_memory


def shape_config(name: str) -> Any:
    """The transformers configuration of a shape. Raises ConfigError for an unknown name."""
    if name not in shapes():
        raise ConfigError(f"shape {name!r} is not known; {suggestion(name, sorted(shapes()))}")
    settings = dict(shapes()[name])
    return AutoConfig.for_model(
        settings.pop("model_type"), **settings, bos_token_id=1, eos_token_id=None, pad_token_id=0
    )


def random_model(
    name: str, *, device: torch.device, dtype: torch.dtype, seed: int, attn_implementation: str | None = None
) -> PreTrainedModel:
    """A shape filled with random numbers on `device`, in evaluation mode.

    Raises SkipcalError when its weights are more than the memory that is free.
    """
    config = shape_config(name)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype)
    needed, free = sum(p.numel() * p.element_size() for p in empty.parameters()), free_memory(device)
    if free is not None and needed > free:
        raise SkipcalError(
            f"shape {name!r} takes {needed / 1e9:.1f} GB of weights in {str(dtype).removeprefix('torch.')}, "
            f"{free / 1e9:.1f} GB of {device.type} memory are free; try --dtype bfloat16 or a smaller shape"
        )
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )
    model.eval()
    return model
