"""How stock engines are told that a layer has no FFN, and of which models they can be told.

None of them has a Llama without some of its FFNs that loads without code of its own. But in a mixture of
experts of Qwen's, `mlp_only_layers` are plain layers, laid out as Llama's, and the others have experts. So
the layers that keep their FFN are named there, and in each other layer a token gets one of a few experts that
are narrow and zero: what it adds is 0, exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING

from skipcal.errors import UnsupportedModel

EXPERTS = 8  # tensor parallelism in vLLM goes no further than there are experts
WIDTH = 16  # of an expert: a multiple of EXPERTS, as its columns are divided


@dataclass(frozen=True)
class Layout:
    """A mixture of experts whose plain layers are those of a family.

    source: class of the family's models.
    biases: its queries, keys and values have some. norms: its queries and keys have some.
    shared: beside its experts the mixture has one that sees every token; zero here, too.
    """

    source: str
    model_type: str
    biases: bool = False
    norms: bool = False
    shared: bool = False

    @property
    def architecture(self) -> str:
        """The class that engines look for."""
        return {"qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[self.model_type]

    @property
    def always_biased(self) -> bool:
        """Whether engines expect biases of queries, keys and values; a family without has zeros."""
        return self.model_type == "qwen2_moe"


LAYOUTS = {
    "llama": Layout("LlamaForCausalLM", "qwen2_moe", shared=True),
    "mistral": Layout("MistralForCausalLM", "qwen2_moe", shared=True),
    "qwen2": Layout("Qwen2ForCausalLM", "qwen2_moe", biases=True, shared=True),
    "qwen3": Layout("Qwen3ForCausalLM", "qwen3_moe", norms=True),
}
FFN = ("gate_proj", "up_proj", "down_proj")
_KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_cache", "tie_word_embeddings", "rope_parameters", "attention_dropout", "pad_token_id",
    "bos_token_id", "eos_token_id",
)  # fmt: skip


def layout_of(config: Any) -> Layout:
    """The layout for a model of this configuration. Raises UnsupportedModel where there is none."""
    layout = LAYOUTS.get(config.model_type)
    if layout is None:
        raise UnsupportedModel(
            f"models of type {config.model_type!r} cannot be exported: no stock architecture is known that "
            f"has their layers and allows some without an FFN; those that can: {', '.join(LAYOUTS)}"
        )
    for reason in _reasons(config, layout):
        raise UnsupportedModel(f"this {config.model_type} model cannot be exported: {reason}")
    return layout


def _reasons(config: Any, layout: Layout) -> Iterator[str]:
    """What no stock architecture has together with layers that lack an FFN."""
    others = [name for name in config.architectures or [] if name != layout.source]
    if others:
        yield f"it is a {', '.join(others)}, and {layout.source} is what can be written down"
    if getattr(config, "quantization_config", None):
        yield "its weights are quantized; export the unquantized model, and quantize what comes out"
    if config.hidden_act != "silu":
        yield f"its FFNs have the activation {config.hidden_act!r}, and silu is what can be written down"
    if getattr(config, "mlp_bias", False):
        yield "its FFNs have biases"
    if getattr(config, "attention_bias", False):
        yield "its attention has biases beyond those of queries, keys and values"
    types = getattr(config, "layer_types", None) or []
    if getattr(config, "sliding_window", None) or any(kind != "full_attention" for kind in types):
        yield "its attention sees a window"
    heads, width = config.num_attention_heads, config.hidden_size
    head = getattr(config, "head_dim", None) or width // heads
    if layout.model_type == "qwen2_moe" and head * heads != width:
        yield f"its {heads} heads of {head} are not as wide as the model ({width})"


def stock_config(
    config: Any, layout: Layout, left_out: Collection[int], *, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json of the same model, its weights in `dtype`, without the FFNs of the layers `left_out`."""
    kept = {name: getattr(config, name) for name in _KEPT if hasattr(config, name)}
    mixture = {
        "mlp_only_layers": [n for n in range(config.num_hidden_layers) if n not in left_out],
        "decoder_sparse_step": 1,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
        "moe_intermediate_size": WIDTH,
        "use_sliding_window": False,
        **(
            {"qkv_bias": True, "shared_expert_intermediate_size": WIDTH}
            if layout.model_type == "qwen2_moe"
            else {"attention_bias": False, "head_dim": config.head_dim}
        ),
    }
    found: Any = CONFIG_MAPPING[layout.model_type](
        **kept, **mixture, architectures=[layout.architecture], dtype=dtype
    )
    unlike_defaults: dict[str, Any] = found.to_diff_dict()
    return {**mixture, **unlike_defaults}  # another version may have other defaults


def kept_names(config: Any, layout: Layout, left_out: Collection[int]) -> set[str]:
    """Names of the model's tensors that the checkpoint has too."""
    attention = ["q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"]
    attention += ["q_proj.bias", "k_proj.bias", "v_proj.bias"] if layout.biases else []
    attention += ["q_norm.weight", "k_norm.weight"] if layout.norms else []
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not config.tie_word_embeddings:
        names.add("lm_head.weight")
    for n in range(config.num_hidden_layers):
        layer = f"model.layers.{n}"
        names |= {f"{layer}.self_attn.{name}" for name in attention}
        names |= {f"{layer}.input_layernorm.weight", f"{layer}.post_attention_layernorm.weight"}
        if n not in left_out:
            names |= ffn_names([n])
    return names


def ffn_names(layers: Iterable[int]) -> set[str]:
    """Names of the FFNs' tensors in some layers."""
    return {f"model.layers.{n}.mlp.{name}.weight" for n in layers for name in FFN}


def zero_shapes(config: Any, layout: Layout, left_out: Collection[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that the checkpoint has besides, by name. All of them are zeros."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}
    narrow = {"gate_proj": (WIDTH, hidden), "up_proj": (WIDTH, hidden), "down_proj": (hidden, WIDTH)}
    if layout.always_biased and not layout.biases:
        head = hidden // config.num_attention_heads
        rows = {"q_proj": hidden, "k_proj": head * config.num_key_value_heads}
        rows["v_proj"] = rows["k_proj"]
        for n in range(config.num_hidden_layers):
            shapes |= {f"model.layers.{n}.self_attn.{name}.bias": (size,) for name, size in rows.items()}
    for n in left_out:
        mlp = f"model.layers.{n}.mlp"
        shapes[f"{mlp}.gate.weight"] = (EXPERTS, hidden)
        places = [f"{mlp}.experts.{expert}" for expert in range(EXPERTS)]
        if layout.shared:
            shapes[f"{mlp}.shared_expert_gate.weight"] = (1, hidden)
            places.append(f"{mlp}.shared_expert")
        shapes |= {f"{place}.{name}.weight": shape for place in places for name, shape in narrow.items()}
    return shapes
