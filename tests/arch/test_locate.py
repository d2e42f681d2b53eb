"""Finding FFN blocks: the table, the fallback by structure, the proof, the refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from skipcal.arch import families
from skipcal.arch.check import tiny_model
from skipcal.arch.families import FAMILIES, Family, register_family
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
    found = locate(tiny_model(model_type))
    assert found.found == "table"
    assert found.num_layers == 4
    assert found.hidden_size == 32
    assert found.intermediate_size == 48
    assert found.proof_error <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_proof_allows_for_rounding_to_the_models_dtype(dtype: torch.dtype) -> None:
    found = locate(tiny("gemma2").to(dtype))
    assert 0 < found.proof_error <= 2 * torch.finfo(dtype).eps


def test_the_norm_that_is_named_alike_in_gemma2_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its post_attention_layernorm is the attention's: measured there, cosines would be nonsense."""
    right = FAMILIES["gemma2"].chain
    monkeypatch.setitem(FAMILIES, "gemma2", FAMILIES["llama"])
    found = locate(tiny_model("gemma2"))
    assert (found.found, found.family.chain) == ("structure", right)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "gpt2", "opt", "granite"])
def test_a_family_that_is_not_listed_is_found_by_structure(model_type: str) -> None:
    model = tiny(model_type)
    model.config.model_type = "unheard_of"
    found = locate(model)
    assert (found.found, found.model_type) == ("structure", "unheard_of")
    assert found.family == FAMILIES[model_type]


def test_a_family_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "qwen2")
    register_family("qwen2", layers="model.layers", chain=("post_attention_layernorm", "mlp"))
    assert locate(tiny_model("qwen2")).found == "table"
    with pytest.raises(ConfigError, match="chain is empty"):
        register_family("qwen2", layers="model.layers", chain=())


def test_attention_and_ffn_in_parallel_are_refused_with_what_was_found() -> None:
    with pytest.raises(UnsupportedModel) as refused:
        locate(parallel_gpt_neox())
    message = str(refused.value)
    assert "'gpt_neox'" in message
    assert "gpt_neox.layers (3 x GPTNeoXLayer" in message
    assert "register_family" in message
    assert "\n" not in message


def parallel_gpt_neox() -> Any:
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, use_parallel_residual=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_table_entry_that_does_not_fit_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parallel_gpt_neox()
    for family, message in (
        (Family("gpt_neox.layers", ("ln_2", "mlp")), "has no ln_2"),
        (Family("transformer.h", ("ln_2", "mlp")), r"transformer\.h: no such list"),
        (Family("gpt_neox.layers", ("post_attention_layernorm", "mlp")), r"layer 0: \|h \+ f - output\|"),
        (Family("gpt_neox.layers", ("mlp", "post_attention_layernorm")), "not called in that order"),
    ):
        monkeypatch.setitem(FAMILIES, "gpt_neox", family)
        with pytest.raises(UnsupportedModel, match=message):
            locate(model)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("opt", {"do_layer_norm_before": False}), ("stablelm", {"use_parallel_residual": True})],
)
def test_variants_of_known_families_that_cannot_work_are_refused(
    model_type: str, settings: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedModel, match="no FFN block"):
        locate(tiny_model(model_type, **settings))


def test_a_huge_activation_of_one_token_does_not_hide_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = tiny_model("granite").to(torch.bfloat16)  # type: ignore[arg-type]
    model.get_input_embeddings().weight[3, 5] = 3000.0
    model.model.layers[0].mlp.down_proj.weight.mul_(20)
    monkeypatch.setitem(FAMILIES, "granite", FAMILIES["llama"])
    with pytest.raises(UnsupportedModel, match="of its scale"):
        locate(model)


def test_a_multimodal_model_of_a_listed_family_is_found_by_structure() -> None:
    found = locate(multimodal_gemma3())
    assert (found.model_type, found.found) == ("gemma3_text", "structure")
    assert found.family.chain == FAMILIES["gemma3_text"].chain


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


def test_of_a_mixture_only_the_routed_experts_count_as_read() -> None:
    model: Any = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2)
    block = locate(model).blocks[0]
    experts = sum(p.numel() for p in model.model.layers[0].mlp.experts.parameters())
    rest = sum(p.numel() for p in model.model.layers[0].mlp.gate.parameters()) + 32
    assert block.weight_bytes == 4 * (experts // 2 + rest)


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
