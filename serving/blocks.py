"""Where vLLM keeps the FFN blocks of a model, and which of its models are laid out as is needed.

Its decoder layers carry the stream as a pair whose sum it is, and the norm before the FFN forms that sum:
`x, h = norm(x, residual)`. So h, the stream that enters the FFN block, is what this norm returns second; what
the rest of the block makes of x is f, and the next norm adds it to h. Granite's layers add up the stream
themselves: h is what the norm is given, and the layer adds f, scaled, to it. Which modules a block has is
told by the table of families, for vLLM keeps their names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from skipcal.arch.families import FAMILIES, MOE
from skipcal.arch.patch import InstancePatches
from skipcal.errors import UnsupportedModel

OwnFFN: TypeAlias = Callable[[Tensor], Tensor]  # x -> f, each [tokens, hidden]


@dataclass(frozen=True)
class Layout:
    """What vLLM makes of a family.

    kind:  class of the model: another class for the same type has other layers.
    named: what the checkpoint calls it, where that is not the class.
    chain: names of a block's modules, where they are not those of the table of families.
    adds:  the layer adds f to the stream, and its norms are given the stream and return x alone.
    experts: the FFN is a mixture of experts, whose router is told by row what is padding: tokens that run are
           not taken apart from those that skip, the FFN runs for all of a pass unless all of them skip.
    """

    kind: str
    named: str | None = None
    chain: tuple[str, ...] | None = None
    adds: bool = False
    experts: bool = False


# By `config.model_type`.
LAID_OUT = {
    "ernie4_5": Layout("Ernie4_5ForCausalLM"),
    "gemma": Layout("GemmaForCausalLM"),
    "gemma2": Layout("Gemma2ForCausalLM"),
    "gemma3_text": Layout("Gemma3ForCausalLM"),
    "glm4": Layout("Glm4ForCausalLM"),
    "granite": Layout("GraniteForCausalLM", adds=True),
    "llama": Layout("LlamaForCausalLM"),
    "ministral3": Layout("MistralForCausalLM", named="Ministral3ForCausalLM"),
    "mistral": Layout("MistralForCausalLM"),
    "mixtral": Layout("MixtralForCausalLM", chain=("post_attention_layernorm", MOE), experts=True),
    "nemotron": Layout("NemotronForCausalLM"),
    "phi3": Layout("Phi3ForCausalLM"),
    "qwen2": Layout("Qwen2ForCausalLM"),
    "qwen2_moe": Layout("Qwen2MoeForCausalLM", experts=True),
    "qwen3": Layout("Qwen3ForCausalLM"),
    "qwen3_moe": Layout("Qwen3MoeForCausalLM", experts=True),
}
_OUTSIDE = "vLLM adds f to the stream within its layer, where no norm returns their sum"
_BORROWED = "vLLM has no layers of its own for them and runs those of transformers"
_EXPERTS = "of mixtures of experts only mixtral, qwen2_moe and qwen3_moe have been tried"
_NOT_LAID_OUT = {
    name: reason
    for names, reason in (
        ("bloom exaone4 falcon gpt2 gpt_bigcode gpt_neox granite_swa mpt opt stablelm", _OUTSIDE),
        ("arcee cwm glm hunyuan_v1_dense jais2 olmo olmo2 olmo3 seed_oss smollm3 starcoder2", _BORROWED),
        (
            "apertus",
            "a tiny model of theirs decodes other tokens in vLLM than in transformers, skipping or not",
        ),
        (
            "deepseek_v2 deepseek_v3 ernie4_5_moe glm4_moe gpt_oss granitemoe olmoe phimoe qwen3_next",
            _EXPERTS,
        ),
    )
    for name in names.split()
}


@dataclass(frozen=True, eq=False)
class ServedBlock:
    """The FFN block of one decoder layer in vLLM.

    norm:  it adds what attention made to the stream, and returns h second.
    chain: the modules that make f of what the norm returns first, one after the other.
    after: the norm that adds f to h.
    whole: the FFN is given all tokens of a pass or none, see `experts` of `Layout`.
    adds:  norms are given the stream, and the layer adds f to it.
    scale: what the layer multiplies f by as it adds it: what the chain returns is f over it.
    """

    index: int
    norm: nn.Module
    chain: tuple[nn.Module, ...]
    after: nn.Module
    whole: bool = False
    adds: bool = False
    scale: float = 1.0

    def own_ffn(self) -> OwnFFN:
        """What the chain makes of x as the modules are now, whatever is set on them later."""
        forwards = [module.forward for module in self.chain]
        if len(forwards) == 1:
            return forwards[0]

        def ffn(x: Tensor) -> Tensor:
            for forward in forwards:
                x = forward(x)
            return x

        return ffn

    def hand_to(self, ffn: Callable[[Tensor, Tensor], Tensor], patches: InstancePatches) -> None:
        """Have `ffn(x, h)` say what the chain returns.

        The layer takes what its norm returns first through the chain and does nothing else with it. So the
        norm returns x together with h there, and the last module is given both: nothing is kept between two
        calls, and compilers can trace it.
        """
        own = self.norm.forward

        def norm(*given: Any) -> Any:
            x, h = own(*given)
            return (x, h), h

        patches.set(self.norm, "forward", (lambda h: (own(h), h)) if self.adds else norm)
        for module in self.chain[:-1]:
            patches.set(module, "forward", lambda pair: pair)
        patches.set(self.chain[-1], "forward", lambda pair: ffn(*pair))

    def stream_at(self, given: tuple[Any, ...], returned: Any) -> Tensor:
        """The stream at one of its norms, by what that was given and has returned."""
        stream: Tensor = given[0] if self.adds else returned[1]
        return stream

    @property
    def place(self) -> tuple[torch.device, torch.dtype]:
        """Where and in which precision the layer computes."""
        weight = next(self.norm.parameters())
        return weight.device, weight.dtype


def check_family(model_type: str, architectures: list[str]) -> None:
    """Raise UnsupportedModel for a kind of model that is not laid out as Llama is in vLLM."""
    layout = LAID_OUT.get(model_type)
    if layout is None:
        reason = _NOT_LAID_OUT.get(model_type, "their layers are not known to be laid out as Llama's are")
        raise UnsupportedModel(
            f"models of type {model_type!r} cannot be served with skipping: {reason}; those that can: "
            f"{', '.join(LAID_OUT)}"
        )
    expected = layout.named or layout.kind
    other = [name for name in architectures if name != expected]
    if other:
        raise UnsupportedModel(
            f"the model is a {', '.join(other)}; of type {model_type!r} only {expected} can be served with "
            "skipping"
        )


def blocks_of(model: Any, model_type: str) -> tuple[ServedBlock, ...]:
    """The blocks of a loaded model. Raises UnsupportedModel where it is another than its type says."""
    layout, found = LAID_OUT[model_type], type(model).__name__
    if found != layout.kind:
        raise UnsupportedModel(
            f"vLLM runs the model as {found}, skipping needs {layout.kind}; leave out --model-impl and other "
            "options that choose the class"
        )
    family = FAMILIES[model_type][0]
    norm, *chain = layout.chain or family.chain
    stack = model.model
    layers = list(stack.layers)
    after = [*(layer.input_layernorm for layer in layers[1:]), stack.norm]
    return tuple(
        ServedBlock(
            index,
            getattr(layer, norm),
            tuple(getattr(layer, name) for name in chain),
            last,
            whole=layout.experts,
            adds=layout.adds,
            scale=getattr(layer, family.scale) if family.scale else 1.0,
        )
        for index, (layer, last) in enumerate(zip(layers, after, strict=True))
    )
