"""Finding FFN blocks: the table, the fallback by structure, the proof, the refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from skipcal.arch import families
from skipcal.arch.check import tiny_model
from skipcal.arch.families import FAMILIES, UNSUPPORTED, Family, register_family
from skipcal.arch.locate import locate
from skipcal.errors import ConfigError, UnsupportedModel


def tiny(model_type: str) -> Any:
    return tiny_model(model_type)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", FAMILIES)
    for name in list(FAMILIES):
        monkeypatch.setitem(FAMILIES, name, FAMILIES[name])  # what a test changes is put back


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_listed_family_is_proven(model_type: str) -> None:
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"this transformers has no {model_type}")
    found = locate(tiny_model(model_type))
    assert found.found == "table"
    assert found.num_layers == 4
    assert found.hidden_size == 32
    assert found.intermediate_size == (None if model_type in ("dbrx", "mpt") else 48)
    assert found.proof_error <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_allows_for_rounding_to_the_models_dtype(dtype: torch.dtype) -> None:
    found = locate(tiny("gemma2").to(dtype))
    assert 0 < found.proof_error <= 2 * torch.finfo(dtype).eps


def test_the_norm_that_is_named_alike_in_gemma2_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its post_attention_layernorm is the attention's: measured there, cosines would be nonsense."""
    right = FAMILIES["gemma2"][0].chain
    monkeypatch.setitem(FAMILIES, "gemma2", FAMILIES["llama"])
    found = locate(tiny_model("gemma2"))
    assert (found.found, found.family.chain) == ("structure", right)


@pytest.mark.parametrize(
    "model_type",
    ["llama", "gemma2", "olmo2", "olmo_hybrid", "gpt2", "opt", "openai-gpt", "granite", "granitemoeshared",
     "gpt_neox", "gptj", "falcon", "cohere2_moe", "mixtral", "gemma4_text"],
)  # fmt: skip
def test_a_family_that_is_not_listed_is_found_by_structure(model_type: str) -> None:
    model = tiny(model_type)
    model.config.model_type = "unheard_of"
    found = locate(model)
    assert (found.found, found.model_type) == ("structure", "unheard_of")
    assert found.family in FAMILIES[model_type]


def test_a_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "qwen2")
    register_family("qwen2", layers="model.layers", chain=("post_attention_layernorm", "mlp"))
    assert locate(tiny_model("qwen2")).found == "table"
    with pytest.raises(ConfigError, match=r"the chain is \(\); expected the names"):
        register_family("qwen2", layers="model.layers", chain=())
    with pytest.raises(ConfigError, match="the chain is 'mlp'"):
        register_family("qwen2", layers="model.layers", chain="mlp")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="summed 2 is not within 1 to 1"):
        register_family("qwen2", layers="model.layers", chain=("mlp",), summed=2)


def test_a_parallel_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FAMILIES["gptj"][0]
    monkeypatch.delitem(FAMILIES, "gptj")
    register_family("gptj", layers="transformer.h", chain=("mlp",), attention="attn")
    found = locate(tiny_model("gptj"))
    assert (found.found, found.kind, found.family) == ("table", "parallel", right)


@pytest.mark.parametrize("model_type", ["mamba", "bert", "rwkv"])
def test_a_family_that_cannot_work_is_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModel, match=re.escape(UNSUPPORTED[model_type])):
        locate(tiny_model(model_type))


@pytest.mark.parametrize("model_type", ["mamba", "falcon_mamba", "nemotron_h", "rwkv", "bert"])
def test_nor_does_the_structure_find_blocks_where_there_are_none(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {}
    if model_type == "nemotron_h":
        settings = {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
                    "layers_block_type": ["mamba", "attention", "mamba", "mlp"]}  # fmt: skip
    model = tiny_model(model_type, **settings)
    monkeypatch.delitem(UNSUPPORTED, model_type)
    with pytest.raises(UnsupportedModel, match="no FFN block that satisfies") as refused:
        locate(model)
    message = str(refused.value)
    assert f'register_family("{model_type}"' in message
    assert "\n" not in message


def test_an_encoder_is_refused_for_what_later_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(UNSUPPORTED, "bert")
    chain = ("intermediate.dense", "output.dense")
    register_family("bert", layers="bert.encoder.layer", chain=chain, into="output.LayerNorm")
    model: Any = tiny_model("bert")
    with pytest.raises(UnsupportedModel, match=r"later tokens change an earlier token's .* it is not causal"):
        locate(model)
    assert locate(tiny_model("bert", is_decoder=True)).found == "table"


def test_a_table_entry_that_does_not_fit_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("mamba")
    monkeypatch.delitem(UNSUPPORTED, "mamba")
    for family, message in (
        (Family("backbone.layers", ("ln_2", "mlp")), "has no ln_2"),
        (Family("transformer.h", ("ln_2", "mlp")), r"transformer\.h: no such list"),
        (Family("backbone.layers", ("mixer",)), r"layer 0: \|h \+ f - sum\|"),
        (Family("backbone.layers", ("mixer", "norm")), "not called in that order"),
    ):
        monkeypatch.setitem(FAMILIES, "mamba", (family,))
        with pytest.raises(UnsupportedModel, match=message):
            locate(model)


def test_what_the_sequential_reading_misses_in_a_parallel_layer_is_seen_in_half_precision() -> None:
    """An outlier of the stream, as trained models have, hides attention's part from a maximum."""
    model: Any = tiny_model("gpt_neox").to(torch.bfloat16)  # type: ignore[arg-type]
    model.get_input_embeddings().weight[:, 5] = 3000.0
    found = locate(model)
    assert (found.found, found.kind) == ("table", "parallel")


def test_a_layer_that_is_called_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("llama")
    model.model.layers[2] = model.model.layers[1]
    with pytest.raises(UnsupportedModel, match="called 2 times in one pass"):
        locate(model)


def test_a_huge_activation_of_one_token_does_not_hide_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("granite").to(torch.bfloat16)  # type: ignore[arg-type]
    model.get_input_embeddings().weight[3, 5] = 3000.0
    model.model.layers[0].mlp.down_proj.weight.mul_(20)
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    found = locate(model)
    assert (found.found, found.blocks[0].scale) == ("structure", 0.22)


def test_a_multimodal_model_of_a_listed_family_is_found_by_structure() -> None:
    found = locate(multimodal_gemma3())
    assert (found.model_type, found.found) == ("gemma3_text", "structure")
    assert found.family.chain == FAMILIES["gemma3_text"][0].chain


def multimodal_gemma3() -> Any:
    text = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=64,
    )  # fmt: skip
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28
    )
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**vision, "patch_size": 14})
    return AutoModelForImageTextToText.from_config(config).eval()


def parameters(*modules: Any) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


# Weights that a token reads in layer 3 of each tiny mixture: 2 of 4 experts, the router, what is shared.
MIXTURES: dict[str, tuple[str, float, tuple[str, ...]]] = {
    # family: experts, share of them, everything else in the block
    "mixtral": ("mlp.experts", 0.5, ("mlp.gate", "post_attention_layernorm")),
    "qwen2_moe": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_expert", "mlp.shared_expert_gate",
                                       "post_attention_layernorm")),
    "qwen3_moe": ("mlp.experts", 0.5, ("mlp.gate", "post_attention_layernorm")),
    "olmoe": ("mlp.experts", 0.5, ("mlp.gate", "post_attention_layernorm")),
    "deepseek_v2": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_experts", "post_attention_layernorm")),
    "deepseek_v3": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_experts", "post_attention_layernorm")),
    "gpt_oss": ("mlp.experts", 0.5, ("mlp.router", "post_attention_layernorm")),
    "granitemoe": ("block_sparse_moe.experts", 0.5,
                   ("block_sparse_moe.router", "post_attention_layernorm")),
    "granitemoeshared": ("block_sparse_moe.experts", 0.5,
                         ("block_sparse_moe.router", "shared_mlp", "post_attention_layernorm")),
    "phimoe": ("mlp.experts", 0.5, ("mlp.router", "post_attention_layernorm")),
    "glm4_moe": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_experts", "post_attention_layernorm")),
    "ernie4_5_moe": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_experts", "post_attention_layernorm")),
    "hunyuan_v1_moe": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_mlp", "post_attention_layernorm")),
    "aria_text": ("mlp.experts", 0.5, ("mlp.router", "mlp.shared_experts", "post_attention_layernorm")),
    "dbrx": ("ffn.experts", 0.5, ("ffn.router", "norm_attn_norm.norm_2")),
    "jetmoe": ("mlp.input_linear mlp.output_linear", 0.5, ("mlp.router", "post_attention_layernorm")),
    "llama4_text": ("feed_forward.experts", 0.25, ("feed_forward.router", "feed_forward.shared_expert",
                                                   "post_attention_layernorm")),
    "minimax": ("mlp.experts", 0.5, ("mlp.gate",)),
    "jamba": ("feed_forward.experts", 0.5, ("feed_forward.router", "pre_ff_layernorm")),
    "lfm2_moe": ("feed_forward.experts", 0.5, ("feed_forward.gate", "ffn_norm")),
    "cohere2_moe": ("mlp.experts", 0.5, ("mlp.gate", "mlp.shared_experts")),
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(MIXTURES))
def test_of_a_mixture_only_the_routed_experts_count_as_read(model_type: str) -> None:
    experts, share, others = MIXTURES[model_type]
    block = locate(tiny_model(model_type)).blocks[3]
    find = block.layer.get_submodule
    routed = parameters(*map(find, experts.split()))
    biases = [b for name, b in block.layer.named_buffers() if "bias" in name]  # of the routers
    biases += [p for name, p in block.layer.named_parameters() if name == "mlp.bias"]
    rest = parameters(*map(find, others)) + sum(b.numel() for b in biases)
    expected = 4 * (share * routed + rest)
    assert block.mixture
    assert block.weight_bytes == expected


def test_a_dense_layer_of_a_mixture_counts_in_full() -> None:
    dense, sparse = locate(tiny_model("deepseek_v3")).blocks[:2]
    assert (dense.mixture, sparse.mixture) == (False, True)
    assert dense.weight_bytes == 4 * parameters(*dense.chain)
    assert sparse.weight_bytes < 4 * parameters(*sparse.chain)


def test_what_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="Linear is no transformers model"):
        locate(torch.nn.Linear(2, 2))


def test_the_proof_leaves_no_hook_and_no_mode_behind() -> None:
    model: Any = tiny_model("llama")
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    locate(model)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_block_bytes_count_shared_parameters_once() -> None:
    model: Any = tiny_model("llama")
    block = locate(model).blocks[0]
    assert block.weight_bytes == 4 * (3 * 32 * 48 + 32)
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight
    assert locate(model).blocks[0].weight_bytes == 4 * (2 * 32 * 48 + 32)
