"""The table of model families: where the FFN block of a decoder layer is.

One line a family, keyed by `config.model_type`. A block is written as a *chain*: the modules of
one decoder layer that are called one after the other between `h_i` and `f_i`. The first is given
the residual stream `h_i`; what the last returns (times `scale`, where the layer scales it) is
`f_i`, which the layer adds to `h_i`.

The chain is not a matter of names: `post_attention_layernorm` is the FFN's own norm in Llama and
the attention's output norm in Gemma 2 and OLMo 2. Each located chain is therefore proven
numerically before it is used (`skipcal.arch.locate`).
"""

from __future__ import annotations

from dataclasses import dataclass

from skipcal.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """Where one model family keeps its FFN blocks.

    layers: dotted path from the causal language model to the list of decoder layers.
    chain:  attribute paths in a layer, in the order of their calls, from `h_i` to `f_i`.
    scale:  attribute of the layer that `f_i` is multiplied by before it is added, if any.
    """

    layers: str
    chain: tuple[str, ...]
    scale: str | None = None


PRE_NORM = ("post_attention_layernorm", "mlp")
SANDWICH = ("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm")
POST_NORM = ("mlp", "post_feedforward_layernorm")

FAMILIES: dict[str, Family] = {
    "gemma": Family("model.layers", PRE_NORM),
    "gemma2": Family("model.layers", SANDWICH),
    "gemma3_text": Family("model.layers", SANDWICH),
    "gpt2": Family("transformer.h", ("ln_2", "mlp")),
    "granite": Family("model.layers", PRE_NORM, scale="residual_multiplier"),
    "llama": Family("model.layers", PRE_NORM),
    "mistral": Family("model.layers", PRE_NORM),
    "olmo": Family("model.layers", PRE_NORM),
    "olmo2": Family("model.layers", POST_NORM),
    "olmo3": Family("model.layers", POST_NORM),
    "opt": Family("model.decoder.layers", ("final_layer_norm", "fc1", "fc2")),
    "phi3": Family("model.layers", PRE_NORM),
    "qwen2": Family("model.layers", PRE_NORM),
    "qwen3": Family("model.layers", PRE_NORM),
    "smollm3": Family("model.layers", PRE_NORM),
    "starcoder2": Family("model.layers", PRE_NORM),
}


def register_family(
    model_type: str, *, layers: str, chain: tuple[str, ...], scale: str | None = None
) -> None:
    """Add a family to the table, for this process.

    A second registration of the same `model_type` replaces the first. The numerical proof still
    decides whether a model of the family is accepted.
    """
    if not chain:
        raise ConfigError(f"family {model_type!r}: the chain is empty; name the FFN's modules")
    FAMILIES[model_type] = Family(layers=layers, chain=tuple(chain), scale=scale)
