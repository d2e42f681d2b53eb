"""A decoder layer of a captured step, whole: eight launches for one row, ten for several.

    norm, q, k, v | rotary embedding, cache | attention, its splits | o, residual | gate, up | down, residual

and what the rule asks. Layers as Llama's can be run so: two RMSNorms, plain linears, a rotary embedding
of halves, of pairs or, as in some layers of SmolLM3, none, with or without biases and norms of the heads.
Where q, k and v are one matrix, as in Phi-3, they are taken as its rows. The same launches are made whoever
skips.
It stands on the layer as its `forward` while a step runs, so that hooks on the layer are called.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from skipcal.arch.locate import Block
from skipcal.arch.patch import InstancePatches
from skipcal.arch.stored import is_wrapper
from skipcal.core.surrogates import Surrogates
from skipcal.errors import first_words
from skipcal.ops.ffn import FFNWeights, ffn
from skipcal.ops.project import project
from skipcal.ops.rotary_cache import HeadNorms, rotary_cache
from skipcal.ops.rules import StepRule, Unasked
from skipcal.ops.stand_in import add_surrogate
from skipcal.runtime.engines.graph_attention import Sight
from skipcal.runtime.engines.step_cache import StepLayer
from skipcal.runtime.engines.step_proof import added_error

# What q, k, v and o are called; three in one matrix stand in it one below the other.
_LINEARS = (("q_proj", "k_proj", "v_proj", "o_proj"), ("qkv_proj", "o_proj"))
_HEAD_NORMS = {"q_norm", "k_norm"}
Turns = Literal["halves", "pairs", "nothing"]
_PROOF_TOKENS = 3  # in the cache before the token by which a layer is tried
# Of what a layer adds, and of its keys and values. The noise is 0.009 in half precision at most, by
# tests/step_proof.json.
_LIMIT = 2e-2


@dataclass(frozen=True)
class AttentionWeights:
    """norm: [hidden]; q, k, v: [heads * head_dim, hidden]; o: [hidden, heads * head_dim]; all contiguous.

    biases: of q, k, v; o_bias: of o; None: they have none. scale: of the scores. turns: what the token's
    position turns of a head.
    """

    norm: Tensor
    eps: float
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    biases: tuple[Tensor, ...] | None
    o_bias: Tensor | None
    head_norms: HeadNorms | None
    scale: float
    turns: Turns = "halves"


class FusedLayer:
    """A whole decoder layer in kernels, of which those of the FFN are predicated."""

    def __init__(
        self,
        block: Block,
        attention: AttentionWeights,
        weights: FFNWeights,
        rule: StepRule,
        surrogates: Surrogates,
        sight: Sight,
    ) -> None:
        """Run the layer of `block` by its weights. sight: what its attention may see."""
        self._block, self._attention, self._weights = block, attention, weights
        self._rule, self._surrogates, self._sight = rule, surrogates, sight

    def set_on(self, patches: InstancePatches) -> None:
        """The layer's own forward is not called."""
        patches.set(self._block.layer, "forward", self._forward)

    def abandon(self) -> None:
        """Nothing is open."""

    def run(self, stream: Tensor, positions: tuple[Tensor, Tensor], cached: StepLayer) -> Tensor:
        """The stream [batch, hidden] after the layer. positions: cos and sin, [batch or 1, 1, rotary]."""
        h = self._attended(stream, positions, cached)
        index = self._block.index
        skip = self._rule.before(index, h)
        if self._rule.wants_f:
            f, sums = ffn(h, skip, self._weights)
            y = h + f
            self._rule.after(index, h, f, sums)
        else:
            y, sums = ffn(h, skip, self._weights, adds=True)
            self._rule.after(index, h, None, sums)
        add_surrogate(self._surrogates, index, y, skip)
        return y

    def _forward(
        self,
        hidden_states: Tensor,
        *_: Any,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Any,
        **__: Any,
    ) -> Tensor:
        stream = hidden_states.view(-1, hidden_states.shape[-1])
        cached = past_key_values.layers[self._block.index]
        return self.run(stream, position_embeddings, cached).view_as(hidden_states)

    def _attended(self, stream: Tensor, positions: tuple[Tensor, Tensor], cached: StepLayer) -> Tensor:
        """The stream with what attention adds, [batch, hidden]; the token is in the cache then."""
        weights = self._attention
        keys, values, place = cached.keys, cached.values, cached.place_static
        assert keys is not None and values is not None and place is not None
        qkv = project(
            stream,
            (weights.q, weights.k, weights.v),
            biases=weights.biases,
            norm=weights.norm,
            eps=weights.eps,
        )
        cos, sin = (t[:, 0, :0] if weights.turns == "nothing" else t[:, 0] for t in positions)
        pairs = weights.turns == "pairs"
        q = rotary_cache(qkv, cos, sin, place, keys, values, norms=weights.head_norms, pairs=pairs)
        a = self._sight.attend(q, keys, values, scale=weights.scale)
        biases = None if weights.o_bias is None else (weights.o_bias,)
        return project(a.view(len(stream), -1), (weights.o,), biases=biases, residual=stream)


def attention_weights(block: Block, weights: FFNWeights, rotary: Any, rows: int) -> AttentionWeights | str:
    """The attention's weights for FusedLayer, or why the layer cannot run in it.

    weights: of its FFN. rotary: the module that makes cos and sin, or None. The names are only a guess: on a
    few random rows the layer has to give what its modules give.
    """
    layer: Any = block.layer
    if rotary is None:
        return "no rotary embedding stands beside the layers"
    if not _is_attention_and_ffn(block):
        return f"{type(layer).__name__} is not attention and FFN with a norm before each"
    norm, attention = layer.input_layernorm, layer.self_attn
    eps = getattr(norm, "variance_epsilon", None)
    if not isinstance(eps, float) or not isinstance(getattr(norm, "weight", None), Tensor):
        return f"{type(norm).__name__} is no RMSNorm"
    inside = dict(attention.named_children())
    names = next((names for names in _LINEARS if {*inside} in ({*names}, {*names} | _HEAD_NORMS)), None)
    if names is None:
        return f"{type(attention).__name__} is not four linears"
    linears = [inside[name] for name in names]
    if not all(type(linear) is nn.Linear and not is_wrapper(linear.weight) for linear in linears):
        return f"the linears of {type(attention).__name__} are not plain ones"
    if any(part._forward_hooks or part._forward_pre_hooks for part in layer.modules() if part is not layer):
        return f"{type(layer).__name__} has hooks inside"
    found = _found(norm.weight, eps, attention, linears)
    if isinstance(found, str):
        return found
    tensors = [norm.weight, *(t for linear in linears for t in linear.parameters())]
    if any(not t.is_contiguous() or t.dtype != weights.gate.dtype for t in tensors):
        return f"the weights of {type(attention).__name__} are not all of one dtype and contiguous"
    wrong: list[str] = []
    for turns in get_args(Turns):  # no name tells it
        tried = replace(found, turns=turns)
        why = _unlike(block, tried, weights, rotary, rows)
        if why is None:
            return tried
        wrong.append(why)
    return wrong[0]


def _is_attention_and_ffn(block: Block) -> bool:
    """Whether the layer is a norm and attention, a norm and an FFN, and dropouts that drop nothing."""
    rest = {
        name
        for name, part in block.layer.named_children()
        if not any(part is module for module in block.chain)
        and not (type(part) is nn.Dropout and (part.p == 0 or not part.training))
    }
    return rest == {"input_layernorm", "self_attn"} and len(block.chain) == 2


def _found(norm: Tensor, eps: float, attention: Any, linears: list[Any]) -> AttentionWeights | str:
    *first, o = linears
    with_bias = [linear.bias is not None for linear in first]
    if len(set(with_bias)) > 1:
        return f"some linears of {type(attention).__name__} have biases"
    head_norms, scale = None, getattr(attention, "scaling", None)
    if hasattr(attention, "q_norm"):
        head_norms = _head_norms(attention)
        if head_norms is None:
            return f"{type(attention).__name__} norms more than single heads"
    if not isinstance(scale, float):
        return f"{type(attention).__name__} does not say how it scales scores"
    queries = o.in_features
    q, k, v = _three([linear.weight for linear in first], queries)
    return AttentionWeights(
        norm=norm,
        eps=eps,
        q=q,
        k=k,
        v=v,
        o=o.weight,
        biases=_three([linear.bias for linear in first], queries) if all(with_bias) else None,
        o_bias=o.bias,
        head_norms=head_norms,
        scale=scale,
    )


def _three(parts: list[Tensor], queries: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, or what of one tensor are theirs: its first `queries` rows, and halves of the others."""
    if len(parts) == 1:
        q, rest = parts[0].tensor_split([queries])
        parts = [q, *rest.tensor_split(2)]
    q, k, v = parts
    return q, k, v


def _head_norms(attention: Any) -> HeadNorms | None:
    """Those of an attention that has norms; None: they are not of single heads."""
    q, k = (getattr(part, "weight", None) for part in (attention.q_norm, attention.k_norm))
    eps, shape = getattr(attention.q_norm, "variance_epsilon", None), (attention.head_dim,)
    if q is None or k is None or q.shape != shape or k.shape != shape or not isinstance(eps, float):
        return None
    return HeadNorms(q=q, k=k, eps=eps)


@torch.no_grad()
def _unlike(
    block: Block, attention: AttentionWeights, weights: FFNWeights, rotary: Any, rows: int
) -> str | None:
    """Why the kernels would not compute the layer; None: they do, but for rounding."""
    name = type(block.layer).__name__
    try:
        errors = _errors(block, attention, weights, rotary, rows)
    except Exception as error:  # whatever a layer wants besides what it is given here
        return f"{name} could not be tried alone ({first_words(error)})"
    return None if bool((errors <= _LIMIT).all()) else f"{name} computes something else"


def _errors(block: Block, attention: AttentionWeights, weights: FFNWeights, rotary: Any, rows: int) -> Tensor:
    """Of the key, the value and the sum of a token behind others in the cache, relative to their sizes."""
    layer: Any = block.layer
    device, dtype = weights.gate.device, weights.gate.dtype
    hidden, head_dim = weights.gate.shape[1], layer.self_attn.head_dim
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    h = some(rows, 1, hidden)
    heads = len(attention.k) // head_dim
    seen = some(rows, heads, _PROOF_TOKENS, head_dim), some(rows, heads, _PROOF_TOKENS, head_dim)
    place = torch.tensor([_PROOF_TOKENS], device=device)
    positions = rotary(h, place.expand(rows, 1))
    theirs, mine = (StepLayer(_PROOF_TOKENS + 1, _PROOF_TOKENS + 1) for _ in range(2))
    for cached in (theirs, mine):
        cached.update(*seen)
    own = layer.forward(
        h, attention_mask=None, past_key_values=_OneLayer(theirs), position_embeddings=positions
    )
    mine.place_static = place
    nobody = Unasked(torch.zeros(block.index + 1, rows, dtype=torch.bool, device=device))
    sight = Sight(place[0] + 1, None)
    fused = FusedLayer(block, attention, weights, nobody, Surrogates({}), sight)
    y = fused.run(h[:, 0], positions, mine)
    written = [(c.keys[:, :, -1], c.values[:, :, -1]) for c in (mine, theirs)]  # type: ignore[index]
    cached_errors = [added_error(a, b, torch.zeros_like(b)) for a, b in zip(*written, strict=True)]
    return torch.stack([*cached_errors, added_error(y, own[:, 0], h[:, 0])])


class _OneLayer:
    """A cache, as far as the attention of one layer asks for it."""

    def __init__(self, cached: StepLayer) -> None:
        self._cached = cached

    def update(self, keys: Tensor, values: Tensor, _layer: int, *__: Any) -> tuple[Tensor, Tensor]:
        return self._cached.update(keys, values)
