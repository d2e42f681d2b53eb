"""Gates and surrogates for tiny models, made by hand: neither fitted nor good."""

from __future__ import annotations

from typing import Any

import torch

from skipcal.arch.locate import locate, observe
from skipcal.core.gate import GateRule, Gates
from skipcal.core.policy import Policy
from skipcal.core.report import SkipReport
from skipcal.core.surrogates import LowRank, RoutedLowRank, Surrogate, Surrogates
from skipcal.profiles.parts import GateFit, GateInfo, GatePoint, GateSettings
from skipcal.profiles.schema import SkipProfile
from skipcal.profiles.tensors import GateTensors
from skipcal.runtime.session import skipping

PROMPT = [5, 17, 31, 8, 44]
NEW = 12
LAYERS = (1, 2)


def random_gates(layers: tuple[int, ...], hidden: int = 32) -> Gates:
    random = torch.Generator().manual_seed(3)
    count = len(layers)
    return Gates(
        layers=layers,
        weight=torch.randn(count, hidden, generator=random) / hidden**0.5,
        log_norm_weight=torch.randn(count, generator=random),
        bias=torch.randn(count, generator=random),
    )


def gates_for(model: Any, layers: tuple[int, ...] = LAYERS) -> Gates:
    """Random gates whose scores on the model's own streams lie around 0, in every layer."""
    gates = random_gates(layers, model.config.hidden_size)
    rule = GateRule(gates, 0.0)
    middles: dict[int, float] = {}

    def see(layer: int, h: torch.Tensor, f: torch.Tensor) -> None:
        scores = rule.scores(layer, h.reshape(-1, h.shape[-1]))
        middles[layer] = float(torch.as_tensor(scores).median())

    blocks = tuple(block for block in locate(model).blocks if block.index in layers)
    with observe(blocks, see):
        model(torch.arange(3, 63)[None], use_cache=False)
    return Gates(layers, gates.weight, gates.log_norm_weight, gates.bias - torch.tensor([*middles.values()]))


def surrogates_for(model: Any, layers: tuple[int, ...] = LAYERS, rank: int = 3, maps: int = 1) -> Surrogates:
    """Random maps that add about as much as an FFN of `lively` does."""
    random = torch.Generator().manual_seed(4)
    hidden = model.config.hidden_size
    return Surrogates({layer: random_map(hidden, rank, maps, random) for layer in layers})


def random_map(hidden: int, rank: int, maps: int, random: torch.Generator) -> Surrogate:
    """One map, or several that tokens are spread over."""
    routes, several = (maps, (maps,)) if maps > 1 else (0, ())
    down = torch.randn(rank + routes, hidden, generator=random) / hidden**0.5
    up = torch.randn(*several, hidden, rank, generator=random)
    bias = torch.randn(*several, hidden, generator=random)
    if not routes:
        return LowRank(down, up, bias)
    return RoutedLowRank(down, up, bias, 0.1 * torch.randn(routes, generator=random))


def generated(model: Any, policy: Policy | None, new: int = NEW) -> tuple[Any, SkipReport | Any]:
    """Greedy decoding of PROMPT with its logits; without a policy outside any session."""
    ids = torch.tensor([PROMPT])
    options = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": new,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    if policy is None:
        return model.generate(**options), None
    with skipping(model, policy=policy) as run:
        return model.generate(**options), run.report


def with_gate(
    profile: SkipProfile, *, layers: tuple[int, ...] = LAYERS, name: str = "made", model: Any = None
) -> SkipProfile:
    """The profile with a gate that nobody fitted, and tensors for its model.

    model: the model itself, for gates and surrogates as `gates_for` and `surrogates_for` make them.
    """
    hidden = profile.model.hidden_size
    random = torch.Generator().manual_seed(5)
    maps = {
        layer: LowRank(
            torch.randn(2, hidden, generator=random),
            torch.randn(hidden, 2, generator=random),
            torch.randn(hidden, generator=random),
        )
        for layer in layers
    }
    gates, surrogates = random_gates(layers, hidden), Surrogates(maps)
    if model is not None:
        gates, surrogates = gates_for(model, layers), surrogates_for(model, layers, rank=2)
    tensors = GateTensors.pack(gates, surrogates, profile.model.fingerprint)
    file = f"{name}.surrogates.safetensors"
    points = [
        GatePoint(
            target_skip_ratio=target,
            threshold=threshold,
            predicted_skip_ratio=target + 0.01,
            realised_skip_ratio=target,
            by_corpus={"text": target},
        )
        for target, threshold in ((0.1, -2.0), (0.2, -1.0), (0.4, 0.5))
    ]
    fit = GateFit(
        corpora=[], windows=4, window_tokens=16, tokens=52, seed=0, sweeps=[0.0, 0.2], damage="fisher",
        rank=2, surrogate_share=0.031, gate_r_squared=[0.5, 0.75], surrogate_error=[0.4, 0.625],
        seconds=1.0, peak_memory_bytes=10**9, config={},
    )  # fmt: skip
    gate = GateInfo(
        tensors=file, sha256=tensors.sha256, layers=list(layers), warm_up_tokens=3, operating_points=points,
        fit=fit,
    )  # fmt: skip
    settings = GateSettings(threshold=-1.0, warm_up_tokens=3, tensors=file, sha256=tensors.sha256)
    return profile.with_gate(gate, settings, tensors)
