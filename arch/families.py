"""The table of model families: where the FFN block of a decoder layer is.

One line a kind of block, keyed by `config.model_type`. A block is written as a *chain*: the modules
of one decoder layer that are called one after the other between `h_i` and `f_i`. The first is given
the residual stream `h_i`; what the last returns (times `scale`, where the layer scales it) is
`f_i`, which the layer adds to `h_i`.

In parallel layers attention and FFN both read the layer's input x, and the layer returns x + a + f.
There `h_i` is the stream after attention's contribution, x + a, as everywhere else; `attention`
names the module that returns a, and the chain need not be given `h_i`.

The chain is not a matter of names: `post_attention_layernorm` is the FFN's own norm in Llama and
the attention's output norm in Gemma 2 and OLMo 2. Each located chain is therefore proven
numerically before it is used (`skipcal.arch.locate`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipcal.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Where one model family keeps its FFN blocks.

    layers: dotted path from the causal language model to the list of decoder layers.
    chain:  attribute paths in a layer, in the order of their calls, from `h_i` to `f_i`.
    scale:  attribute of the layer that `f_i` is multiplied by before it is added, if any.
    attention: parallel layers only: the module whose output is added to the layer's input for `h_i`.
    summed: the outputs of so many modules at the end of the chain add up to `f_i`.
    stream_scale: attribute of the layer that the stream is multiplied by before `f_i` is added to it.
    into:   the module that is given h + f, where the layer goes on with it; None: the layer returns it.
    output_scale: attribute of the layer that h + f is multiplied by before the layer returns it.
    whole:  modules of the chain are given other things than what the chain makes of h, so tokens that
            run cannot be taken apart: the FFN runs for all tokens of a pass, unless all of them skip.
    """

    layers: str
    chain: tuple[str, ...]
    scale: str | None = None
    attention: str | None = None
    summed: int = 1
    stream_scale: str | None = None
    into: str | None = None
    output_scale: str | None = None
    whole: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of all modules that a layer has to have."""
        return (*self.chain, *(name for name in (self.attention, self.into) if name))

    @property
    def values(self) -> tuple[str, ...]:
        """Names of all numbers that a layer has to have."""
        return tuple(name for name in (self.scale, self.stream_scale, self.output_scale) if name)


PRE_NORM = ("post_attention_layernorm", "mlp")
SANDWICH = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")
POST_NORM = ("mlp", "post_feedforward_layernorm")
_GEMMA4_MOE = (  # the experts' router, which reads h, always runs
    "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm_1", "pre_feedforward_layernorm_2",
    "experts", "post_feedforward_layernorm_2", "post_feedforward_layernorm",
)  # fmt: skip
GLM_SANDWICH = ("post_attention_layernorm", "mlp", "post_mlp_layernorm")
HYBRID = ("pre_ff_layernorm", "feed_forward")
GPT2 = ("ln_2", "mlp")
TWO_LINEARS = ("final_layer_norm", "fc1", "fc2")
MOE = "block_sparse_moe"

_LLAMA = Family("model.layers", PRE_NORM)
_GRANITE = Family("model.layers", PRE_NORM, scale="residual_multiplier")
_GRANITE_MOE = Family("model.layers", ("post_attention_layernorm", MOE), scale="residual_multiplier")
_GRANITE_DENSE = Family(
    "model.layers", ("post_attention_layernorm", "shared_mlp"), scale="residual_multiplier"
)
_GRANITE_SHARED = Family(
    "model.layers", ("post_attention_layernorm", MOE, "shared_mlp"), scale="residual_multiplier", summed=2
)
_PARALLEL = Family("model.layers", ("mlp",), attention="self_attn")

# By families alike, with the variants of each: of those whose modules a layer has, the first that
# is proven. A layer that lacks a module of the first variant is tried with the next.
_TABLE: tuple[tuple[str, tuple[Family, ...]], ...] = (
    (
        """arcee aria_text axk1 axk2 bailing_hybrid bitnet cwm deepseek_v2 deepseek_v3 deepseek_v32 diffllama
        dots1 ernie4_5 ernie4_5_moe exaone_moe flint gemma glm glm4_moe glm4_moe_lite glm_moe_dsa
        gpt_oss helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 internlm3 iquestcoder jais2 jetmoe kimi_linear
        laguna llama mellum mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral
        nanochat nemotron olmo olmoe persimmon phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text
        qwen3_moe qwen3_next seed_oss smollm3 solar_open starcoder2 youtu""",
        (_LLAMA,),
    ),
    ("gemma2 gemma3_text", (Family("model.layers", SANDWICH),)),
    (
        "gemma4_text gemma4_unified_text",
        (
            Family("model.layers", _GEMMA4_MOE, into="per_layer_input_gate", whole=True),
            Family("model.layers", _GEMMA4_MOE, output_scale="layer_scalar", whole=True),
            Family("model.layers", SANDWICH, into="per_layer_input_gate"),
            Family("model.layers", SANDWICH, output_scale="layer_scalar"),
        ),
    ),
    ("exaone4 flex_olmo olmo2 olmo3", (Family("model.layers", POST_NORM),)),
    ("olmo_hybrid", (Family("model.layers", POST_NORM), _LLAMA)),
    ("vaultgemma", (Family("model.layers", ("pre_feedforward_layernorm", "mlp")),)),
    ("glm4 kolibri1", (Family("model.layers", GLM_SANDWICH),)),
    ("afmoe", (Family("model.layers", ("pre_mlp_layernorm", "mlp", "post_mlp_layernorm")),)),
    ("apertus", (Family("model.layers", ("feedforward_layernorm", "mlp")),)),
    ("modernbert-decoder", (Family("model.layers", ("mlp_norm", "mlp")),)),
    ("recurrent_gemma", (Family("model.layers", ("channel_pre_norm", "mlp_block")),)),
    ("llama4_text", (Family("model.layers", ("post_attention_layernorm", "feed_forward")),)),
    ("bamba falcon_h1 jamba", (Family("model.layers", HYBRID),)),
    ("lfm2 lfm2_moe", (Family("model.layers", ("ffn_norm", "feed_forward")),)),
    ("lfm3", (Family("model.layers", ("ffn_norm", "feed_forward", "post_ffn_norm")),)),
    ("granite granite_swa", (_GRANITE,)),
    ("granitemoe", (_GRANITE_MOE,)),
    ("granitemoeshared granitemoe_swa granitemoehybrid", (_GRANITE_SHARED, _GRANITE_DENSE, _GRANITE_MOE)),
    ("minicpm3", (Family("model.layers", PRE_NORM, scale="residual_scale"),)),
    (
        "hyperclovax",
        (
            Family(
                "model.layers",
                ("post_attention_layernorm", "mlp", "post_norm2"),
                scale="residual_multiplier",
            ),
        ),
    ),
    (
        "minimax",
        (Family("model.layers", ("mlp",), scale="mlp_beta_factor", stream_scale="mlp_alpha_factor"),),
    ),
    ("doge", (Family("model.layers", PRE_NORM, stream_scale="post_attention_residual"),)),
    ("gpt2 gpt_bigcode gpt_neo", (Family("transformer.h", GPT2),)),
    ("mpt", (Family("transformer.blocks", ("norm_2", "ffn.up_proj", "ffn.down_proj")),)),
    (
        "bloom",
        (Family("transformer.h", ("post_attention_layernorm", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),),
    ),
    ("dbrx", (Family("transformer.blocks", ("norm_attn_norm.norm_2", "ffn")),)),
    ("ctrl", (Family("transformer.h", ("layernorm2", "ffn")),)),
    ("openai-gpt", (Family("transformer.h", ("mlp",), into="ln_2"),)),
    (
        "opt",
        (
            Family("model.decoder.layers", TWO_LINEARS),
            Family("model.decoder.layers", ("fc1", "fc2"), into="final_layer_norm"),
        ),
    ),
    ("xglm", (Family("model.layers", TWO_LINEARS),)),
    ("biogpt", (Family("biogpt.layers", TWO_LINEARS),)),
    ("gpt_neox_japanese", (Family("gpt_neox_japanese.layers", PRE_NORM),)),
    # Parallel, or either by a flag of the configuration. Sequential first: h = x + a holds there too.
    ("cohere cohere2 cohere2_moe phi", (_PARALLEL,)),
    ("stablelm", (_LLAMA, _PARALLEL)),
    ("codegen gptj", (Family("transformer.h", ("mlp",), attention="attn"),)),
    (
        "gpt_neox",
        (Family("gpt_neox.layers", PRE_NORM), Family("gpt_neox.layers", PRE_NORM, attention="attention")),
    ),
    (
        "falcon",
        (Family("transformer.h", PRE_NORM), Family("transformer.h", ("mlp",), attention="self_attention")),
    ),
)

FAMILIES: dict[str, tuple[Family, ...]] = {
    name: variants for names, variants in _TABLE for name in names.split()
}

_NO_FFN = "its layers have no FFN: one mixer each, which attention always needs"
_SOME_WITHOUT = "some of its layers have no FFN, and a profile counts one for each layer"
_STREAMS = "its layers mix several residual streams, so h + f is nowhere a stream of its own"
_ENCODER = "it is an encoder: later tokens change what an earlier one becomes"
_HALF = "it is one half of a model whose other half it reads by cross-attention"

# Why these cannot work; whoever knows better can register them.
UNSUPPORTED: dict[str, str] = {
    name: reason
    for names, reason in (
        ("falcon_mamba mamba mamba2 xlstm", _NO_FFN),
        ("nemotron_h zamba zamba2", _SOME_WITHOUT),
        ("deepseek_v4 gemma3n_text hy_v4 qwen4_exp_text", _STREAMS),
        ("rwkv", "its FFN keeps a state from token to token, and a skipped one would leave a hole in it"),
        ("reformer", "its layers are reversible: two streams, each changed by the other"),
        ("longcat_flash", "a layer has two FFNs and a mixture that bypasses the second attention"),
        ("zaya", "its router's state is handed from FFN to FFN, and a skipped one would leave a hole in it"),
        ("hrm_text", "its layers are called several times in one pass"),
        ("beam", "the sum of h and f is rescaled by its depth inside one function"),
        ("mllama_text_model", "its cross-attention layers are left out of passes without images"),
        (
            "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert",
            _ENCODER,
        ),
        ("bart bigbird_pegasus blenderbot blenderbot-small git marian mbart moshi_decoder musicgen", _HALF),
        ("musicgen_decoder musicgen_melody mvp pegasus plbart prophetnet trocr whisper", _HALF),
        (
            "roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta xlm-roberta-xl xlnet xmod",
            _ENCODER,
        ),
    )
    for name in names.split()
}


def families_listed() -> list[dict[str, Any]]:
    """The table in plain values: family, how it would be found, kind of layers and chain of modules."""
    return [
        {
            "family": name,
            "found": "table",
            "kind": " or ".join(dict.fromkeys(_order(family) for family in variants)),
            "chain": list(variants[0].chain),
        }
        for name, variants in sorted(FAMILIES.items())
    ]


def _order(family: Family) -> str:
    return "sequential" if family.attention is None else "parallel"


def register_family(
    model_type: str,
    *,
    layers: str,
    chain: tuple[str, ...],
    scale: str | None = None,
    attention: str | None = None,
    summed: int = 1,
    stream_scale: str | None = None,
    into: str | None = None,
    output_scale: str | None = None,
    whole: bool = False,
) -> None:
    """Add a family to the table, for this process; the arguments are those of `Family`.

    A second registration of the same `model_type` replaces the first. The numerical proof still
    decides whether a model of the family is accepted. Raises ConfigError for an impossible chain.
    """
    if not chain or isinstance(chain, str):  # type: ignore[unreachable]  # a string is easily typed
        raise ConfigError(
            f"family {model_type!r}: the chain is {chain!r}; expected the names of the FFN's modules, "
            "such as ('ffn_norm', 'ffn')"
        )
    if not 1 <= summed <= len(chain):
        raise ConfigError(f"family {model_type!r}: summed {summed} is not within 1 to {len(chain)}")
    FAMILIES[model_type] = (
        Family(layers, tuple(chain), scale, attention, summed, stream_scale, into, output_scale, whole),
    )
