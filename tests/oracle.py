"""The skip rule, written down naively: one token at a time, no hooks, no batches, no engine.

It walks the layers of a Llama by hand with a growing cache, and is the judge of every engine.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from skipcal.runtime.policy import SkipPolicy


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


def step(model: Any, cache: DynamicCache, ids: torch.Tensor, policy: SkipPolicy | None) -> tuple[Any, ...]:
    """One forward pass [1, seq] -> logits of the last token, layers skipped, cosines."""
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
        inside = policy is not None and policy.cold_s <= i < policy.cold_e
        may = policy is not None and (policy.max_skips is None or count < policy.max_skips)
        if inside and armed and may:
            skipped.append(i)
            cosines.append(float("nan"))
            count += 1
            continue
        f = layer.mlp(layer.post_attention_layernorm(h))
        value = cosine(h[0, -1], f[0, -1])
        cosines.append(value)
        if inside and not armed and policy is not None and value >= policy.threshold:
            armed = True
        h = h + f
    return model.lm_head(stack.norm(h))[0, -1], skipped, cosines


def decode(model: Any, prompt: list[int], policy: SkipPolicy, new_tokens: int) -> Decoded:
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
