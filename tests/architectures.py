"""Tiny models of every kind of architecture, and what a layer adds in each, written down by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from by_hand import Oddity
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skipcal.arch.check import tiny_model
from skipcal.core.policy import SkipPolicy

SANDWICHED = Oddity(adds=("post_feedforward_layernorm",))
GPT2 = Oddity(layers="transformer.h")
HYBRID = Oddity(adds=("feed_forward",))
GRANITE = Oddity(scale=0.22)
SHARED = Oddity(adds=("block_sparse_moe", "shared_mlp"), scale=0.22)


def alike(names: str, oddity: Oddity = Oddity()) -> dict[str, tuple[str, Oddity, dict[str, Any]]]:  # noqa: B008
    return {name: (name, oddity, {}) for name in names.split()}


# What a layer adds where it is not `mlp`, by hand from the families' code.
CASES: dict[str, tuple[str, Oddity, dict[str, Any]]] = {
    **alike("cohere cohere2 cohere2_moe deepseek_v3 deepseek_v32 diffllama doge modernbert-decoder youtu"),
    **alike("ernie4_5_moe glm4_moe glm_moe_dsa gpt_oss hunyuan_v1_moe jetmoe kimi_linear llama mixtral"),
    **alike("nemotron olmoe phi phi3 phimoe qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next stablelm"),
    **alike("vaultgemma apertus"),
    **alike("gemma2 gemma3_text olmo2 exaone4 flex_olmo", SANDWICHED),
    **alike("codegen gpt2 gpt_neo gptj falcon", GPT2),
    **alike("bamba falcon_h1 jamba lfm2 lfm2_moe llama4_text", HYBRID),
    **alike("afmoe glm4", Oddity(adds=("post_mlp_layernorm",))),
    **alike("granite", GRANITE),
    **alike("granitemoeshared granitemoehybrid", SHARED),
    "granitemoe": ("granitemoe", Oddity(adds=("block_sparse_moe",), scale=0.22), {}),
    "minimax": ("minimax", Oddity(scale=0.75), {}),
    "gemma4": ("gemma4_text", Oddity(adds=("post_feedforward_layernorm",), into="per_layer_input_gate"), {}),
    "gemma4, mixture": (
        "gemma4_text",
        Oddity(adds=("post_feedforward_layernorm",), into="per_layer_input_gate"),
        {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "bloom": ("bloom", Oddity(layers="transformer.h", adds=("mlp.dense_4h_to_h",)), {}),
    "mpt": ("mpt", Oddity(layers="transformer.blocks", adds=("ffn.down_proj",)), {}),
    "dbrx": ("dbrx", Oddity(layers="transformer.blocks", adds=("ffn",)), {}),
    "opt": ("opt", Oddity(layers="model.decoder.layers", adds=("fc2",)), {}),
    "opt, norm after the sum": (
        "opt",
        Oddity(layers="model.decoder.layers", adds=("fc2",), into="final_layer_norm"),
        {"do_layer_norm_before": False},
    ),
    "xglm": ("xglm", Oddity(adds=("fc2",)), {}),
    "biogpt": ("biogpt", Oddity(layers="biogpt.layers", adds=("fc2",)), {}),
    "gpt_neox": ("gpt_neox", Oddity(layers="gpt_neox.layers"), {}),
    "gpt_neox, sequential": ("gpt_neox", Oddity(layers="gpt_neox.layers"), {"use_parallel_residual": False}),
    "stablelm, parallel": ("stablelm", Oddity(), {"use_parallel_residual": True}),
    "falcon, two norms": ("falcon", GPT2, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2}),
    "falcon, sequential": ("falcon", GPT2, {"parallel_attn": False}),
}  # fmt: skip
PARALLEL = {
    "cohere", "cohere2", "cohere2_moe", "phi", "codegen", "gptj", "gpt_neox", "falcon", "falcon, two norms",
    "stablelm, parallel",
}  # fmt: skip


def lively_case(case: str) -> tuple[Any, Oddity]:
    """The tiny model with FFNs and attention that add about as much as is there."""
    model_type, oddity, settings = CASES[case]
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    model: Any = tiny_model(model_type, **settings)
    random = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name and "wte" not in name and "router" not in name:
            parameter.mul_(6.0)
        elif parameter.dim() == 1:
            parameter.add_(torch.rand(parameter.shape, generator=random) * 0.3)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, oddity


def policy_between(seen: list[float], **rest: Any) -> SkipPolicy:
    """A threshold in the widest gap among the middle half of the cosines: no rounding decides."""
    values = sorted(seen)
    middle = values[len(values) // 4 : 3 * len(values) // 4]
    gap = max(range(len(middle) - 1), key=lambda i: middle[i + 1] - middle[i])
    return SkipPolicy(
        cold_s=0, cold_e=4, threshold=(middle[gap] + middle[gap + 1]) / 2, warm_up_tokens=2, **rest
    )
