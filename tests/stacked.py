"""Modules laid out as vLLM's, passes over them, and policies: what tests of the host share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from gated import random_gates, random_map
from torch import Tensor, nn
from torch.nn import functional as F

from skipcal.core.chosen_ffns import ChosenFFNs
from skipcal.core.gate import GatePolicy
from skipcal.core.policy import Policy, SkipPolicy
from skipcal.core.substituted import Substituted
from skipcal.core.surrogates import Surrogates
from skipcal.serving.blocks import ServedBlock
from skipcal.serving.clock import BatchTokens
from skipcal.serving.host import ServingHost

HIDDEN, LAYERS = 32, 6


class Norm(nn.Module):
    """Adds what it is given to the stream, in place as kernels do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual.add_(x)
        return residual / residual.norm(dim=-1, keepdim=True) * HIDDEN**0.5 * self.weight, residual


class FFN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)
        self.calls: list[int] = []  # tokens of each

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        f: Tensor = self.down(torch.tanh(self.up(x)))
        return f * 2


class Linear(nn.Linear):
    """As vLLM's: the bias may be left to the caller."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class GatedFFN(nn.Module):
    """As vLLM lays out a Llama's: gate and up side by side."""

    def __init__(self, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = Linear(HIDDEN, 6 * HIDDEN, bias=bias)
        self.down_proj = Linear(3 * HIDDEN, HIDDEN)
        for parameter in self.parameters():
            parameter.mul_(3.0)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        f: Tensor = self.down_proj(F.silu(gate) * up)[0]
        return f


class Stack(nn.Module):
    """Layers without attention: no token depends on another."""

    def __init__(self, ffn: Callable[[], nn.Module] = FFN) -> None:
        super().__init__()
        self.first = nn.ModuleList(Norm() for _ in range(LAYERS))
        self.norms = nn.ModuleList(Norm() for _ in range(LAYERS))
        self.ffns: Any = nn.ModuleList(ffn() for _ in range(LAYERS))
        self.last = Norm()
        self.blocks: list[ServedBlock] = [
            ServedBlock(n, self.norms[n], (self.ffns[n],), (*self.first, self.last)[n + 1])
            for n in range(LAYERS)
        ]

    def forward(self, stream: Tensor) -> Tensor:
        x, residual = torch.zeros_like(stream), stream.clone()
        for first, norm, ffn in zip(self.first, self.norms, self.ffns, strict=True):
            x, residual = first(x, residual)
            x, residual = norm(x * 0.2, residual)
            x = ffn(x)
        _, out = self.last(x, residual)
        assert isinstance(out, Tensor)
        return out


def surrogates(layers: Sequence[int] = (1, 2, 4), seed: int = 4, maps: int = 1) -> Surrogates:
    random = torch.Generator().manual_seed(seed)
    return Surrogates({n: random_map(HIDDEN, 3, maps, random) for n in layers})


STATIC = ChosenFFNs(method="static", layers=(1, 3, 4), probability=1.0, warm_up_tokens=2)
TOLERANCES = (1.0, 1.0, 2.0, 1.0, 1.5, 1.0)
POLICIES: dict[str, Policy] = {
    "cosine": SkipPolicy(cold_s=0, cold_e=6, threshold=0.9, warm_up_tokens=2),
    "cosine, two at most": SkipPolicy(cold_s=1, cold_e=6, threshold=0.85, warm_up_tokens=2, max_skips=2),
    "cosine, tolerances": SkipPolicy(
        cold_s=1, cold_e=6, threshold=0.8, warm_up_tokens=2, max_skips=1, tolerances=TOLERANCES
    ),
    "gate": GatePolicy(
        gates=random_gates((1, 2, 4)), surrogates=surrogates(), threshold=0.5, warm_up_tokens=2
    ),
    "gate of several maps": GatePolicy(
        gates=random_gates((1, 2, 4)), surrogates=surrogates(maps=4), threshold=0.5, warm_up_tokens=2
    ),
    "static": STATIC,
    "static+surrogates": Substituted(STATIC, surrogates()),
    "static+fitted": Substituted(STATIC, surrogates(), "fitted"),
}


NAMES = count()


def batch(
    steps: Sequence[int],
    *,
    out: Sequence[int] = (),
    again: Sequence[int] = (),
    targets: Sequence[float | None] | None = None,
    names: Sequence[str] | None = None,
) -> BatchTokens:
    """Tokens of a request each.

    out: places of requests that do not want skipping; again: of tokens computed before; targets and names: of
    each request, by default other ones in every pass.
    """
    places = np.arange(len(steps))
    asked = targets or [0.0 if n in out else None for n in places]
    return BatchTokens(
        np.array(steps),
        (np.array(steps) >= 0) & ~np.isin(places, again),
        places,
        tuple(asked),
        tuple(names or (f"{next(NAMES)}" for _ in places)),
    )


def hosted(stack: Stack, policy: Policy, **more: Any) -> ServingHost:
    host = ServingHost(stack.blocks, policy, **more)
    host.attach()
    stream = torch.randn(2, HIDDEN, device=stack.last.weight.device)
    host.run(batch([-2, -1]), None, lambda: stack(stream))  # a prompt, on which all is proven
    for ffn in stack.ffns:
        if isinstance(ffn, FFN):
            ffn.calls.clear()
    return host


def alone(stack: Stack, policy: Policy, stream: Tensor, steps: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Each token in a pass of its own, and what all of them skipped by layer."""
    host = hosted(stack, policy)
    rows = [
        host.run(batch([step]), None, partial(stack, h[None])) for h, step in zip(stream, steps, strict=True)
    ]
    host.detach()
    return torch.cat(rows), host.report.skipped_per_layer


def assert_equal_but_for_rounding(got: Tensor, expected: Tensor) -> None:
    """An element is a sum whose terms may be as large as the largest of all: each rounds by an eps of it."""
    rounding = 2 * LAYERS * torch.finfo(expected.dtype).eps * expected.abs().max()
    assert float((got - expected).abs().max()) <= rounding


STEPS = [5, -1, 0, 1, 2, 3, 30, 2, 9, 4]
