"""Tiny random models, one of each listed family, to prove the table against transformers."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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
_GPT2 = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 48}
_MOE = {
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}
_LATENT = {  # attention with compressed keys and values, as in DeepSeek
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
_ROUTED = {**_MOE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
_DEEPSEEK = {**_ROUTED, **_LATENT, "first_k_dense_replace": 1}
_INDEXED = {**_DEEPSEEK, "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2}
_LOCAL_EXPERTS = {**_MOE, "num_local_experts": 4}
_EXPERTS = {**_MOE, "num_experts": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
_LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_HYBRID_TYPES = ["linear_attention", "full_attention"] * 2
_WINDOW = {"sliding_window": 64}

_SPECIAL: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "codegen": {**_GPT2, "rotary_dim": 4},
    "openai-gpt": _GPT2,
    "ctrl": {**_GPT2, "dff": 48},
    "gpt_neo": {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]]},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 4, "attention_heads": 4},
    "bloom": {"n_layer": 4, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "use_cache": True},
    "dbrx": {
        "d_model": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 256,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "granite": {"residual_multiplier": 0.22},
    "granite_swa": {"residual_multiplier": 0.22, **_WINDOW},
    "granitemoe": {"residual_multiplier": 0.22, **_LOCAL_EXPERTS},
    "granitemoeshared": {"residual_multiplier": 0.22, "shared_intermediate_size": 24, **_LOCAL_EXPERTS},
    "granitemoe_swa": {
        "residual_multiplier": 0.22, "shared_intermediate_size": 24, **_LOCAL_EXPERTS, **_WINDOW,
    },
    "granitemoehybrid": {
        "residual_multiplier": 0.22, "shared_intermediate_size": 24, **_LOCAL_EXPERTS, **_MAMBA,
        "layer_types": ["mamba", "attention"] * 2,
    },
    "hyperclovax": {"residual_multiplier": 0.22},
    "gemma2": _WINDOW,
    "gemma3_text": _WINDOW,
    "gemma4_unified_text": {**_WINDOW, "global_head_dim": 8},
    "gemma4_text": {
        **_WINDOW, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8,
    },
    "vaultgemma": _WINDOW,
    "olmo3": _WINDOW,
    "olmo_hybrid": {**_LINEAR, "num_key_value_heads": 4, "layer_types": _HYBRID_TYPES},
    "exaone4": _WINDOW,
    "cohere2": _WINDOW,
    "cohere2_moe": {**_EXPERTS, **_WINDOW, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "falcon": {"ffn_hidden_size": 48},
    "mixtral": _LOCAL_EXPERTS,
    "minimax": {
        **_LOCAL_EXPERTS, "mlp_alpha_factor": 1.5, "mlp_beta_factor": 0.75, "block_size": 16,
    },
    "minimax_m2": _LOCAL_EXPERTS,
    "minimax_m3_vl_text": {**_LOCAL_EXPERTS, "dense_intermediate_size": 48, "shared_intermediate_size": 16},
    "phimoe": _LOCAL_EXPERTS,
    "gpt_oss": {**_LOCAL_EXPERTS, **_WINDOW},
    "jetmoe": {**_LOCAL_EXPERTS, "kv_channels": 8, "num_key_value_heads": 2},
    "llama4_text": {
        **_LOCAL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 2, "attention_chunk_size": 64,
    },
    "qwen2_moe": _EXPERTS,
    "qwen3_moe": _EXPERTS,
    "qwen3_next": {**_EXPERTS, **_LINEAR, "layer_types": _HYBRID_TYPES},
    "qwen3_5_text": {**_LINEAR, "layer_types": _HYBRID_TYPES},
    "qwen3_5_moe_text": {**_EXPERTS, **_LINEAR, "layer_types": _HYBRID_TYPES},
    "olmoe": _EXPERTS,
    "flex_olmo": _EXPERTS,
    "mellum": {**_EXPERTS, **_WINDOW},
    "flint": _EXPERTS,
    "kolibri1": _EXPERTS,
    "laguna": {**_EXPERTS, **_WINDOW},
    "afmoe": {**_EXPERTS, **_WINDOW, "num_shared_experts": 1, "num_dense_layers": 1},
    "exaone_moe": {**_EXPERTS, **_WINDOW, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "hy_v3": {**_EXPERTS, "num_shared_experts": 1, "first_k_dense_replace": 1},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_num_shared_experts": 1,
    },
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": _INDEXED,
    "glm_moe_dsa": _INDEXED,
    "glm4_moe_lite": {**_DEEPSEEK, "mlp_layer_types": ["dense", *["sparse"] * 3]},
    "axk1": _DEEPSEEK,
    "axk2": _DEEPSEEK,
    "youtu": _LATENT,
    "minicpm3": _LATENT,
    "glm4_moe": {**_ROUTED, "first_k_dense_replace": 1},
    "dots1": {**_ROUTED, **_WINDOW, "first_k_dense_replace": 1},
    "solar_open": _ROUTED,
    "mimo_v2_flash": {**_ROUTED, **_WINDOW, "v_head_dim": 8, "num_key_value_heads": 2},
    "kimi_linear": {
        **_ROUTED, **_LATENT, **_LINEAR, "num_local_experts": 4, "layer_types": _HYBRID_TYPES,
        "mlp_layer_types": ["dense", *["sparse"] * 3],
    },
    "bailing_hybrid": {
        **_ROUTED, **_LATENT, "num_local_experts": 4, "first_k_dense_replace": 1, "layer_group_size": 2,
    },
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False},
    "lfm2_moe": {**_EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"] * 2},
    "lfm3": {"layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {
        "lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"],
    },
    "modernbert-decoder": {"local_attention": 64},
    "biogpt": {"num_key_value_heads": 4},
    "doge": {"keep_window_size": 64},
}  # fmt: skip
_FOREIGN = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
# Settings that a family spells in its own way, or refuses.
_OWN_NAMES = {
    **dict.fromkeys(
        ("gpt2", "gpt_bigcode", "gptj", "codegen", "openai-gpt", "ctrl", "mpt", "dbrx"), _FOREIGN
    ),
    "falcon": ("head_dim",),
}


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


def checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`families_listed`, each located in a tiny model: how it was found, kind, chain and proof error.

    `found` and `proof_error` are None where the transformers that is here lacks the family.
    """
    watched = tqdm(rows, desc="prove", unit="family", leave=False, disable=None)
    return [{**row, **_checked(row["family"])} for row in watched]


def _checked(model_type: str) -> dict[str, Any]:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return {"found": None, "proof_error": None}
    found = locate(tiny_model(model_type))
    return {
        "found": found.found,
        "kind": found.kind,
        "chain": list(found.family.chain),
        "proof_error": found.proof_error,
    }
