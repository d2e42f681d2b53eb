"""Tiny random models, one of each listed family, to prove the table against transformers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from skipcal.arch.locate import locate
from skipcal.errors import ConfigError

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "granite": {"residual_multiplier": 0.22},
    "gemma2": {"sliding_window": 64},
    "gemma3_text": {"sliding_window": 64},
    "olmo3": {"sliding_window": 64},
}
_OWN_NAMES = {
    "gpt2": ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings"),
}  # fmt: skip


def tiny_model(model_type: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of 4 layers and hidden size 32 in float32, in evaluation mode.

    overrides: configuration values. Raises ConfigError for a model type transformers lacks.
    """
    settings = {k: v for k, v in _COMMON.items() if k not in _OWN_NAMES.get(model_type, ())}
    try:
        config = AutoConfig.for_model(model_type, **{**settings, **_SPECIAL.get(model_type, {}), **overrides})
    except ValueError as error:
        raise ConfigError(f"transformers has no model type {model_type!r} here") from error
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.eval()
    return model


def proof_error(model_type: str) -> float:
    """The proof's largest relative error on a tiny model of the family."""
    return locate(tiny_model(model_type)).proof_error
