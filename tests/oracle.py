"""The skip rule, written down naively: one token at a time, no hooks, no batches, no engine.

It walks the layers of a Llama by hand with a growing cache, and is the judge of every engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import RoutedLowRank, Surrogate


@dataclass
class Decoded:
    tokens: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    skipped: list[list[int]] = field(default_factory=list)  # of each decode step, the layers skipped
    cosines: list[list[float]] = field(default_factory=list)  # of each decode step, by layer; nan: skipped


def cosine(h: torch.Tensor, f: torch.Tensor) -> float:
    a = h.double()
    b = h.double() + f.double()
    return float((a * b).sum() / (a.pow(2).sum().sqrt() * b.pow(2).sum().sqrt()))


def direction(h: torch.Tensor) -> tuple[torch.Tensor, float]:
    """u and the length of one token's stream, in float64."""
    norm = math.sqrt(sum(v * v for v in h.double().tolist()))
    return math.sqrt(len(h)) * h.double() / norm, norm


def score(policy: GatePolicy, layer: int, h: torch.Tensor) -> float:
    """Of one token, by the formula of core/gate.py."""
    place = policy.gates.layers.index(layer)
    u, norm = direction(h)
    weight, slope, bias = (t[place].double() for t in list(vars(policy.gates).values())[1:])
    return float(weight @ u + slope * math.log(norm) + bias)


def stand_in(policy: Any, layer: int, h: torch.Tensor) -> torch.Tensor:
    """What one token that skips adds: its surrogate, where the policy has one."""
    maps = getattr(policy, "surrogates", None)
    found = maps.maps.get(layer) if maps else None
    if found is None:
        return torch.zeros_like(h)
    u, _ = direction(h)
    return one_map(found, u).to(h.dtype)


def one_map(found: Surrogate, u: torch.Tensor) -> torch.Tensor:
    """s(u) of one direction u [hidden], in float64, by the formulas of core/surrogates.py."""
    down, up, bias = found.down.double(), found.up.double(), found.bias.double()
    if isinstance(found, RoutedLowRank):
        rank = up.shape[-1]
        scores = [float(down[rank + k] @ u.double() + found.route_bias[k].double()) for k in range(len(up))]
        best = scores.index(max(scores))
        down, up, bias = down[:rank], up[best], bias[best]
    s: torch.Tensor = up @ (down @ u.double()) + bias
    return s


def step(model: Any, cache: DynamicCache, ids: torch.Tensor, policy: Any | None) -> tuple[Any, ...]:
    """One forward pass [1, seq] -> logits of the last token, layers skipped, cosines.

    policy: a SkipPolicy, a GatePolicy, a static ChosenFFNs or Substituted around one; None: full.
    """
    rule = policy.policy if isinstance(policy, Substituted) else policy
    stack = model.model
    past = cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1])[None]
    h = stack.embed_tokens(ids)
    rotary = stack.rotary_emb(h, position_ids=positions)
    size = ids.shape[1]
    mask = None
    if size > 1:
        mask = torch.full((size, size), float("-inf")).triu(1)[None, None]
    armed, count = False, 0
    last = float("-inf")  # with tolerances: the cosine of the region's last FFN that ran
    skipped: list[int] = []
    cosines: list[float] = []
    for i, layer in enumerate(stack.layers):
        attended, _ = layer.self_attn(
            hidden_states=layer.input_layernorm(h),
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            position_embeddings=rotary,
        )
        h = h + attended
        inside = may = False
        if isinstance(rule, SkipPolicy):
            inside = rule.cold_s <= i < rule.cold_e
            if rule.tolerances is not None:
                armed = last >= 1 - (1 - rule.threshold) * rule.tolerances[i]
            may = inside and armed and (rule.max_skips is None or count < rule.max_skips)
        elif isinstance(rule, GatePolicy):
            may = i in rule.gates.layers and score(rule, i, h[0, -1]) < rule.threshold
        elif isinstance(rule, ChosenFFNs):
            assert rule.probability == 1
            may = i in rule.layers
        if may:
            skipped.append(i)
            cosines.append(float("nan"))
            count += 1
            h = h + stand_in(policy, i, h[0, -1])
            continue
        f = layer.mlp(layer.post_attention_layernorm(h))
        value = cosine(h[0, -1], f[0, -1])
        cosines.append(value)
        if isinstance(rule, SkipPolicy) and inside and rule.tolerances is not None:
            last, count = value, 0
        elif isinstance(rule, SkipPolicy) and inside and not armed and value >= rule.threshold:
            armed = True
        h = h + f
    return model.lm_head(stack.norm(h))[0, -1], skipped, cosines


def decode(model: Any, prompt: list[int], policy: Any, new_tokens: int) -> Decoded:
    """Greedy decoding of `new_tokens` tokens, step by step, never stopping early."""
    cache = DynamicCache(config=model.config)
    result = Decoded()
    logits, _, _ = step(model, cache, torch.tensor([prompt]), None)  # prefill: the full model
    result.logits.append(logits)
    result.tokens.append(int(logits.argmax()))
    for s in range(new_tokens - 1):
        rule = policy if s >= policy.warm_up_tokens else None
        logits, skipped, cosines = step(model, cache, torch.tensor([[result.tokens[-1]]]), rule)
        result.logits.append(logits)
        result.tokens.append(int(logits.argmax()))
        result.skipped.append(skipped)
        result.cosines.append(cosines)
    return result
